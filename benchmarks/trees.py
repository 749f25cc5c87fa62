"""Measure steps over records that begin alike, as trees (`--share auto`), as trees of records that meet in a step
(`--share group`), and as rows (`--share off`), side by side.

    python benchmarks/trees.py --data DATA                    # all cases; DATA has the folders tools, e2e and instruct
    python benchmarks/trees.py --data DATA --cases tools_8    # one of them, added to the results that are there

tools_8, tools_32   one set of tools as the system prompt of every record (more than 400 tokens), 8 and 32 records a step
tools_8_trl         the same beside TRL, apart: TRL and rows do not fit 24 GB together
e2e                 600 items of E2E with all their references, in the model's chat template
chat                conversations of 6 turns in a template that, like Qwen3's, drops the thoughts of earlier turns: each turn is a
                    record of its own
nothing             E2E's records without a template, one of each item: nothing is shared, and the time is to be the same

`deltaw.train` as a user calls it, LoRA r = 8 on all linear layers, float32. `trees` and `rows` have the same records in the same
order, so their losses are the same, too; `group` has another order, and `trl` (TRL's SFTTrainer at its fastest) its own. Of 32
records a step, rows are computed 8 at a time: all at once they would take 34 GB. Writes results/trees.json.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
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


_MICRO_BATCH = 8
# Of a chat template that, like Qwen3's, has thoughts in the last turn alone
_TEMPLATE = (
    "{% for m in messages %}{% set parts = m.content.split('</think>') %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% else %}{{ parts[-1] | trim }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    records: str
    batch: int
    warm: int
    steps: int
    template: str = "auto"
    rows: tuple[str, ...] = ("trees", "rows")


CASES = {
    "tools_8": Case("tools", 8, 1, 3),
    "tools_8_trl": Case("tools", 8, 1, 3, rows=("trees", "trl")),
    "tools_32": Case("tools", 32, 1, 2),
    "e2e": Case("e2e", 8, 8, 16, rows=("trees", "rows", "group")),
    "chat": Case("chat", 8, 1, 4, rows=("trees", "rows", "group")),
    "nothing": Case("nothing", 8, 8, 16, template="plain"),
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


def _e2e(data: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of 600 items."""
    items: dict[str, list[dict[str, Any]]] = {}
    for line in (data / "e2e" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        items.setdefault(json.loads(line)["prompt"], []).append(json.loads(line))
    return {prompt: items[prompt] for prompt in random.Random(0).sample(sorted(items), 600)}


def e2e(data: Path) -> list[dict[str, Any]]:
    return [record for records in _e2e(data).values() for record in records]


def nothing(data: Path) -> list[dict[str, Any]]:
    return [records[0] for records in _e2e(data).values()]


def chat(data: Path) -> list[dict[str, Any]]:
    """Conversations of six turns, each with a thought."""
    rows = [json.loads(line) for line in (data / "instruct" / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    short = [row for row in rows if not row["input"] and 40 < len(row["output"]) < 400]
    talks = []
    for i in range(0, len(short) - 5, 6):
        turns = []
        for row in short[i : i + 6]:
            thought = f"<think>\nThey ask: {row['instruction'][:60]}\n</think>\n\n"
            turns += [
                {"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": thought + row["output"]},
            ]  # fmt: skip
        talks.append({"messages": turns})
    return talks


RECORDS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "tools": tools, "e2e": e2e, "nothing": nothing, "chat": chat,
}  # fmt: skip


def model_of(case: Case, model: Path, folder: Path) -> Path:
    """The model's folder; of the case of chats a copy of links, with the other template."""
    if case.records != "chat":
        return model
    copy = folder / "model"
    copy.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (copy / file.name).symlink_to(file.resolve())
    (copy / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    return copy


def train(job: dict[str, Any], clock: Clock, share: str) -> None:
    """`deltaw.train` as a user calls it."""
    import deltaw

    case = Case(**job["case"])
    with tempfile.TemporaryDirectory() as folder:
        config = deltaw.TrainConfig(
            out=folder, batch=case.batch, steps=case.warm + case.steps, valid_share=0.0, samples=0, log_every=1, dtype="float32",
            overwrite=True, data=deltaw.DataConfig(template=case.template), share=share,
            micro_batch=_MICRO_BATCH if share == "off" else None,
        )  # fmt: skip
        method = deltaw.LoRA(rank=8, targets="all-linear")
        deltaw.train(job["model"], job["data"], config, method=method, on_event=clock.follow(), progress=False)


def trl(job: dict[str, Any], clock: Clock) -> None:
    """TRL at its fastest, over the same records as conversations of prompt and completion."""
    import train_step

    case = Case(**job["case"])
    named = argparse.Namespace(
        model=job["model"], data=str(Path(job["data"]).parent), steps=case.warm + case.steps,
        case=argparse.Namespace(batch=case.batch, rank=8, targets="all-linear"),
    )  # fmt: skip
    train_step.trl_row(**train_step.TRL_FASTEST, max_length=None)(named, clock)


ROWS: dict[str, Callable[[dict[str, Any], Clock], None]] = {
    name: partial(train, share=share) for name, share in (("trees", "auto"), ("rows", "off"), ("group", "group"))
}
ROWS["trl"] = trl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--model", type=Path, default=HERE.parent / ".cache" / "smollm2")
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
            records = RECORDS[case.records](args.data)
            file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
            of_trl = [
                {"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in records if "messages" in r
            ]
            (Path(folder) / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in of_trl), encoding="utf-8")
            job = {"case": asdict(case), "data": str(file), "model": str(model_of(case, args.model, Path(folder)))}
            cases[name] = asdict(case) | {"rows": race.heat(case.rows, job, warm=case.warm, count=case.steps)}
        machine.write("trees", {"cases": cases})


if __name__ == "__main__":
    main()
