"""Measure steps over records that begin alike, as trees (`--share auto`) and as rows (`--share off`), side by side.

    python benchmarks/trees.py --data DATA                    # all cases; DATA has the folders tools and e2e
    python benchmarks/trees.py --data DATA --cases tools_8    # one of them, added to the results that are there

tools_8, tools_32   one set of tools as the system prompt of every record (more than 400 tokens), 8 and 32 records a step
e2e                 E2E's records in the model's chat template, whose system prompt they share
nothing             E2E's records without a template: nothing is shared, and the time is to be the same

`deltaw.train` as a user calls it, LoRA r = 8 on all linear layers, float32. The same records in the same order, so the losses are
the same, too. Writes results/trees.json.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import race
from race import Clock

HERE = Path(__file__).resolve().parent
# Of a set of tools at most: about 500 tokens
_CHARACTERS = 2000


@dataclass(frozen=True)
class Case:
    records: str
    batch: int
    warm: int
    steps: int
    template: str = "auto"


CASES = {
    "tools_8": Case("tools", 8, 1, 3),
    "tools_32": Case("tools", 32, 1, 2),
    "e2e": Case("e2e", 8, 8, 16),
    "nothing": Case("e2e", 8, 8, 16, template="plain"),
}


def tools(data: Path) -> list[dict[str, Any]]:
    """Records of one turn whose answer is a call, all with one frequent set of tools as their system prompt."""
    rows = [json.loads(line) for line in (data / "tools" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    sets = collections.Counter(json.dumps(row["tools"]) for row in rows)
    common = next(tools for tools, _ in sets.most_common() if len(tools) < _CHARACTERS)
    records = []
    for row in rows:
        asked = next((m["content"] for m in row["messages"] if m["role"] == "user"), "")
        calls = next((m["tool_calls"] for m in row["messages"] if m.get("tool_calls")), None)
        if calls and 0 < len(asked) < 300:
            answer = json.dumps([call["function"] for call in calls])
            turns = (("system", f"You have these tools: {common}"), ("user", asked), ("assistant", answer))
            records.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return records


def e2e(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "e2e" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:4000]]


RECORDS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {"tools": tools, "e2e": e2e}


def train(job: dict[str, Any], clock: Clock, share: str) -> None:
    """`deltaw.train` as a user calls it."""
    import deltaw

    case = Case(**job["case"])
    with tempfile.TemporaryDirectory() as folder:
        config = deltaw.TrainConfig(
            out=folder, batch=case.batch, steps=case.warm + case.steps, valid_share=0.0, samples=0, log_every=1, dtype="float32",
            overwrite=True, data=deltaw.DataConfig(template=case.template), share=share,
        )  # fmt: skip
        method = deltaw.LoRA(rank=8, targets="all-linear")
        deltaw.train(job["model"], job["data"], config, method=method, on_event=clock.follow(), progress=False)


ROWS = {"trees": partial(train, share="auto"), "rows": partial(train, share="off")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--model", default=str(HERE.parent / ".cache" / "smollm2"))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        race.work(args.worker, ROWS, dict)
        return
    import machine

    there = machine.RESULTS / "trees.json"
    cases = json.loads(there.read_text(encoding="utf-8"))["cases"] if there.exists() else {}
    for name in args.cases.split(","):
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "records.jsonl"
            file.write_text("".join(json.dumps(r) + "\n" for r in RECORDS[case.records](args.data)), encoding="utf-8")
            job = {"case": asdict(case), "data": str(file), "model": args.model}
            cases[name] = asdict(case) | {"rows": race.heat(tuple(ROWS), job, warm=case.warm, count=case.steps)}
        machine.write("trees", {"cases": cases})


if __name__ == "__main__":
    main()
