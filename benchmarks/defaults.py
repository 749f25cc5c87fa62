"""Show how near the default flags come to the best of a small grid of learning rates and epochs, by task.

    python benchmarks/defaults.py sst2 --model MINILM --data SST2     # also rte, mrpc, cola
    python benchmarks/defaults.py e2e --model SMOLLM2 --data E2E      # also instruct, tools
    python benchmarks/defaults.py sst2 --model MINILM --data SST2 --only default   # the row of the defaults anew

MODEL and DATA are folders. Every run is `deltaw train MODEL DATA` with a learning rate and epochs of the grid, or without both:
the defaults. Its adapter is then scored on test records that chose nothing. LoRA, rank 8, all linear layers, seed 0.

The share of the best: of classes, the score of the defaults by the grid's best. Of texts, the drop of the loss from the base's
to the defaults' by the drop to the grid's best. A grid without a drop has no share.

Writes results/defaults.json. Each run is kept there at once, and is not trained again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deltaw
import machine
from deltaw.config import from_mapping, keys
from deltaw.data import read
from deltaw.runs.evaluation.evaluate import evaluate
from deltaw.runs.memory.machine import describe

RESULT = machine.RESULTS / "defaults.json"


@dataclass(frozen=True)
class Study:
    train: str
    test: str
    metric: str
    """The score that counts; `loss` counts downwards."""
    lrs: tuple[float, ...]
    epochs: tuple[float, ...]
    most: int | None = None
    """Training records taken; None for all."""
    test_most: int = 10_000
    model: str = "all-MiniLM-L6-v2"
    """Its name, for readers."""


_LANGUAGE = "SmolLM2-135M-Instruct"
_RATES = (1.5e-3, 5e-4, 4.5e-3)
# Of a record with tools at most
_CHARACTERS = 900
STUDIES = {
    "sst2": Study("train.jsonl", "test.jsonl", "accuracy", _RATES, (1, 5), most=1000),
    "rte": Study("train.jsonl", "dev.jsonl", "accuracy", _RATES, (1, 3)),
    "mrpc": Study("train.jsonl", "test.jsonl", "accuracy", _RATES, (1, 3), most=1000),
    "cola": Study("train.jsonl", "dev.jsonl", "matthews", _RATES, (1, 3), most=2000),
    "e2e": Study("train.jsonl", "test.jsonl", "loss", _RATES, (1, 3), most=1000, test_most=200, model=_LANGUAGE),
    "instruct": Study("all.jsonl", "", "loss", _RATES, (1, 3), most=300, model=_LANGUAGE),
    "tools": Study("train.jsonl", "test.jsonl", "loss", _RATES[::2], (1, 3), most=120, test_most=60, model=_LANGUAGE),
}


def records_of(study: Study, data: Path, folder: Path) -> tuple[Path, Path]:
    """Files to train on and to test on; where the data has no test part, every tenth record.

    SmolLM2's template renders no tools, so records with tools get them as text; those of more than about 250 tokens are left out.
    """
    rows = (data / study.train).read_text(encoding="utf-8").splitlines()
    if study.test:
        test = (data / study.test).read_text(encoding="utf-8").splitlines()
    else:
        test, rows = rows[::10], [row for i, row in enumerate(rows) if i % 10]
    if study is STUDIES["tools"]:
        rows, test = (
            [text for text in map(with_tools_as_text, part) if len(text) < _CHARACTERS] for part in (rows, test)
        )
    train_file, test_file = folder / "train_records.jsonl", folder / "test_records.jsonl"
    train_file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    test_file.write_text("\n".join(test) + "\n", encoding="utf-8")
    return train_file, test_file


def with_tools_as_text(row: str) -> str:
    """A record's line with its tools in a system message, and with the answer's calls as its text."""
    record = json.loads(row)
    turns = [{"role": "system", "content": f"You have these tools: {json.dumps(record['tools'])}"}]
    for turn in record["messages"]:
        if turn["role"] == "system":
            turns[0]["content"] += f"\n{turn['content']}"
        else:
            calls = json.dumps([call["function"] for call in turn["tool_calls"]]) if turn.get("tool_calls") else ""
            turns.append({"role": turn["role"], "content": (turn["content"] or "") + calls})
    return json.dumps({"messages": turns})


def scored(study: Study, result: deltaw.RunResult, config: deltaw.DataConfig, test: Path) -> dict[str, float]:
    """Loss and metric on the test records, of the model as it is now."""
    records = read(test, config)
    records = records.only(range(min(len(records), study.test_most)))
    metrics = list(dict.fromkeys(["loss", study.metric]))
    scores = evaluate(result.model, result.tokenizer, records, config, deltaw.GenerateConfig(), metrics=metrics)
    return {name: round(score.value, 5) for name, score in scores.scores.items()}


def trained(
    study: Study, model: str, train: Path, test: Path, settings: dict[str, Any], base: float | None
) -> dict[str, Any]:
    """One run's row: what it was trained with, and how it scores. base: the loss without an adapter, where it is known."""
    reading = deltaw.DataConfig(max_records=study.most)
    with tempfile.TemporaryDirectory() as folder:
        config = deltaw.TrainConfig(data=reading, out=f"{folder}/run", samples=0, **settings)
        result = deltaw.train(model, train, config, progress=False)
        used = from_mapping(deltaw.DataConfig, {k: result.settings[k] for k in keys(deltaw.DataConfig)})
        row = {name: result.settings[name] for name in ("lr", "epochs", "batch")}
        row |= {
            "steps": result.state.step,
            "seconds": round(result.state.seconds, 1),
            "test": scored(study, result, used, test),
        }
        if study.metric == "loss" and base is None:
            deltaw.detach(result.model)
            base = scored(study, result, used, test)["loss"]
    return row | ({} if base is None else {"base": base})


def share_of_best(study: Study, grid: list[dict[str, Any]], default: dict[str, Any]) -> dict[str, Any]:
    """The defaults beside the best of the grid, by the test score. (The best is chosen by it too, which favours the grid.)"""
    if study.metric == "loss":
        best = min(grid, key=lambda row: row["test"]["loss"])
        gain, best_gain = (row["base"] - row["test"]["loss"] for row in (default, best))
    else:
        best = max(grid, key=lambda row: row["test"][study.metric])
        gain, best_gain = (row["test"][study.metric] for row in (default, best))
    share = round(gain / best_gain, 4) if best_gain > 0 else None
    return {"best_lr": best["lr"], "best_epochs": best["epochs"], "share_of_best": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--only", choices=("all", "grid", "default"), default="all")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    study = STUDIES[args.name]
    results = (
        json.loads(args.out.read_text(encoding="utf-8"))
        if args.out.exists()
        else {"benchmark": "defaults", "tasks": {}}
    )
    task = results["tasks"].setdefault(args.name, {"grid": []})
    task |= {"model": study.model, "metric": study.metric, "records": study.most, "machine": describe()}
    task["date"] = time.strftime("%Y-%m-%d")

    def keep() -> None:
        if task["grid"] and task.get("default"):
            task.update(share_of_best(study, task["grid"], task["default"]))
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        train, test = records_of(study, args.data, Path(folder))
        for lr, epochs in itertools.product(study.lrs, study.epochs) if args.only != "default" else ():
            if not any(row["lr"] == lr and row["epochs"] == epochs for row in task["grid"]):
                settings = {"lr": lr, "epochs": float(epochs), "valid_share": 0.0}
                base = next((row["base"] for row in task["grid"] if "base" in row), None)
                task["grid"].append(trained(study, args.model, train, test, settings, base))
                print(args.name, task["grid"][-1], flush=True)
                keep()
        if args.only != "grid":
            base = next((row["base"] for row in task["grid"] if "base" in row), None)
            task["default"] = trained(study, args.model, train, test, {}, base)
            keep()
            print(args.name, "default", task["default"], task.get("share_of_best"), flush=True)


if __name__ == "__main__":
    main()
