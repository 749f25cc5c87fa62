"""Train ranks on real data, for docs/rank.md: SmolLM2 on E2E and on the quickstart's requests, MiniLM on SST-2 and CoLA.

    python benchmarks/ranks_swept.py e2e --model SMOLLM2 --data E2E
    python benchmarks/ranks_swept.py requests --model SMOLLM2 --data REQUESTS   # examples/quickstart/toolcalls.py --out REQUESTS
    python benchmarks/ranks_swept.py cola --model MINILM --data COLA            # also cola_budget, cola_qv; so for all four
    python benchmarks/ranks_swept.py e2e --again         # results/sweep_e2e.json anew from results/swept/e2e.json: no training

MODEL and DATA are folders. Ranks are 1, 2, 4, 8, 16 and 64, with three seeds each; α is 8 and the learning rate one for all.
NAME_qv trains q and v alone over the same ranks, NAME_budget six choices of weights with equal parameters.

Writes results/sweep_NAME.json, and each run's scores as results/swept/NAME.json. From there a sweep resumes, on another machine
too. The runs themselves are in .cache/swept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import deltaw
import machine
from deltaw.runs.evaluation.evaluate import RecordLosses
from deltaw.runs.events import CandidateFinished, SweepEvent
from deltaw.runs.results.study import Failed
from deltaw.runs.results.sweep import SweepRow
from deltaw.runs.sweep import Measurement, choices_of, compared_of, losses_of, sweep
from setups import Setup, glue, write

OUT = Path(".cache/swept")


RANKS = {
    "e2e": Setup(
        "SmolLM2-135M-Instruct", "E2E",
        deltaw.TrainConfig(
            data=deltaw.DataConfig(template="plain", separator=""), steps=100, batch=8, lr=3e-3, eval_every=100, valid_most=64,
            dtype="float32",
        ),
        deltaw.SweepConfig(test_most=300, metrics="loss"),
    ),
    "requests": Setup(
        "SmolLM2-135M-Instruct", "the quickstart's requests",
        deltaw.TrainConfig(
            data=deltaw.DataConfig(template="chat", system="Answer in JSON."), steps=100, batch=8, lr=3e-3, eval_every=100,
            valid_most=64, dtype="float32",
        ),
        deltaw.SweepConfig(test_most=300, metrics="loss"),
    ),
    "sst2": glue("SST-2", deltaw.SweepConfig(test_most=1821, metrics="loss,accuracy"), steps=200, lr=1e-3),
    "cola": glue("CoLA", deltaw.SweepConfig(test_most=1043, metrics="loss,matthews"), steps=1600, lr=3.3e-4),
}  # fmt: skip
# As many parameters as r = 4 on all layers has
BUDGETS = {"e2e": "1.22M", "requests": "1.22M", "sst2": "172k", "cola": "172k"}
SETUPS = (
    RANKS
    | {f"{name}_budget": replace(of, options=replace(of.options, budget=BUDGETS[name])) for name, of in RANKS.items()}
    | {f"{name}_qv": replace(of, options=replace(of.options, targets="qv")) for name, of in RANKS.items()}
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETUPS)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="the intervals anew, from what is kept of each run")
    given = parser.parse_args()
    setup = SETUPS[given.name]
    if given.again:
        again(given.name)
        return
    if not given.model or not given.data:
        parser.error("--model and --data are needed to train")
    folder, kept = OUT / given.name, machine.RESULTS / "swept" / f"{given.name}.json"
    if not folder.exists() and kept.exists():
        put_back(kept, folder)
    config = replace(setup.config, out=str(folder))
    options = replace(setup.options, seeds=given.seeds)

    def hear(event: SweepEvent) -> None:
        if isinstance(event, CandidateFinished):
            outcome = event.outcome
            result = outcome.error if isinstance(outcome, Failed) else outcome.valid_loss
            print(event.name, event.lr, event.seed, result, flush=True)
            keep(folder, kept)

    results = sweep(given.model, given.data, config, options, on_event=hear).results
    write(f"sweep_{given.name}", results, setup)


def keep(folder: Path, kept: Path) -> None:
    """What says how far the sweep is, in one file."""
    found = {str(p.relative_to(folder)): json.loads(p.read_text()) for p in sorted(folder.glob("runs/*/score.json"))}
    for run in found.values():
        run["losses"] = {k: [round(v, 4) for v in values] for k, values in run.get("losses", {}).items()}
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"sweep.json": json.loads((folder / "sweep.json").read_text())} | found) + "\n")


def again(name: str) -> None:
    """What the losses of the test records come to by item. Scores other than the loss stay as they were."""
    path = machine.RESULTS / f"sweep_{name}.json"
    results, kept = (
        json.loads(p.read_text(encoding="utf-8")) for p in (path, machine.RESULTS / "swept" / f"{name}.json")
    )
    measurements = []
    for row in results["rows"]:
        runs = [
            run for folder, run in kept.items()
            if folder.startswith(f"runs/{row['targets']}-r{row['rank']}-{row['lr']}-") and "losses" in run
        ]  # fmt: skip
        losses = losses_of([RecordLosses(**run["losses"]) for run in runs], [run["task"]["seed"] for run in runs])
        row["scores"]["loss"] = {"seeds": losses.values.tolist(), **losses.interval().plain()}
        measurements.append(Measurement(SweepRow.from_json(row), losses))
    choices = choices_of(measurements, SETUPS[name].options.margin)
    results["choices"] = {targets: dataclasses.asdict(choice) for targets, choice in choices.items()}
    results["compared"] = [dataclasses.asdict(candidate) for candidate in compared_of(measurements)]
    results["sets"] = {"test": f"{len(runs[0]['losses']['items']):,} records of {losses.items:,} items"}
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def put_back(kept: Path, folder: Path) -> None:
    for name, values in json.loads(kept.read_text()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
