"""Inference with the adapters of a comparison, timed in a process of its own.

    python -m deltaw.runs.timing FOLDER

FOLDER/timing.json says which model and adapters; FOLDER/latency.json is what came out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TASK, RESULT = "timing.json", "latency.json"
_ROUNDS = 9


def main(folder: Path) -> int:
    """Exit code."""
    from deltaw.files.formats.atomic import write_text

    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    write_text(folder / RESULT, json.dumps({"task": task, "rows": run(task)}, indent=1, ensure_ascii=False) + "\n")
    return 0


def run(task: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each task: its name, batch, the base's seconds and the others' ratios to it."""
    from deltaw.files import store
    from deltaw.model.summary import updates
    from deltaw.runs.evaluation import latency
    from deltaw.training.opening import of_adapter, opened
    from deltaw.training.tasks import Causal, task_of

    data = of_adapter(next(iter(task["adapters"].values())))  # of one comparison, so all alike
    model = opened(task["model"], data, dtype=task["dtype"], device=task["device"]).model.eval()
    names: dict[str, str] = {}
    for i, (name, adapter) in enumerate(task["adapters"].items()):  # a name may hold dots
        names[f"m{i}"] = name
        store.load(model, adapter, name=f"m{i}", activate=False)
    mergeable = [n for n in names if all(u.exact_product is not None for u in updates(model, n).values())]
    ways = latency.ways(model, list(names), merged=mergeable[:1])
    tasks = {("forward", b, n): latency.forward(model, b, n) for b, n in task["passes"]}
    if task_of(data) is Causal:
        tasks |= {("decode, 8 tokens", b, 64): latency.decoding(model, b) for b in task["decoding"]}
    rows = []
    for (what, batch, length), each in tasks.items():
        found = latency.measure(ways, each, rounds=_ROUNDS, seconds=task["seconds"])
        ratios = {_named(way, names): ratio for way, ratio in found.ratios.items() if way != latency.BASE}
        rows.append({
            "what": what, "batch": batch, "length": length, "base": found.seconds[latency.BASE], "ratios": ratios,
            "rounds": found.rounds,
        })  # fmt: skip
    return rows


def _named(way: str, names: dict[str, str]) -> str:
    name, _, merged = way.partition(", ")
    return names[name] + (f", {merged}" if merged else "")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
