"""Measure a training step with each method of `deltaw compare`: `deltaw train`, SmolLM2-135M on E2E.

    python benchmarks/methods_step.py --data DATA/e2e

Each method runs in its own process, their steps in turn on the same batches. LoRA is in every heat. Times are ratios to LoRA's
step; memory is the peak over the loaded model and its adapter. Writes results/methods_step.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import race

HERE = Path(__file__).resolve().parent
HEATS = (("lora", "full", "bitfit", "houlsby", "pfeiffer"), ("lora", "lora-qv", "dora", "prefix", "ia3"))


@dataclass(frozen=True)
class Job:
    """What a row gets."""

    name: str
    model: str
    data: str
    batch: int
    steps: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with E2E's train.jsonl")
    parser.add_argument("--model", default=str(HERE.parent / ".cache" / "smollm2"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    rows = {name: row for heat in HEATS for name in heat}
    if chosen.worker:
        told = json.loads(chosen.worker)
        race.work(chosen.worker, rows, lambda given: Job(name=told["row"], **given))
        return
    if not chosen.data:
        sys.exit("--data: the folder with E2E's train.jsonl")
    import machine

    warm = 3
    job = dataclasses.asdict(Job("", chosen.model, chosen.data, chosen.batch, warm + chosen.steps))
    del job["name"]
    found: dict[str, Any] = {}
    for names in HEATS:
        for name, values in race.heat(names, job, warm=warm, count=chosen.steps).items():
            kept = {k: values[k] for k in ("seconds_per_step", "tokens_per_second", "peak_over_loaded_gb")}
            against = 1.0 if name == "lora" else values["times_the_time_of"]["lora"]
            found.setdefault(name, kept | {"times_the_time_of_lora": against})
            print(name, found[name], file=sys.stderr, flush=True)
    machine.write(
        "methods_step",
        {"model": "SmolLM2-135M-Instruct, bfloat16", "data": "E2E", "batch": chosen.batch, "rows": found},
    )


def row(job: Job, clock: race.Clock) -> None:
    """`deltaw.train` as a comparison calls it."""
    import deltaw
    from deltaw.methods.registry import contestants

    (contestant,) = contestants(job.name)
    method = contestant.method
    if contestant.name == "bitfit":
        method = dataclasses.replace(method, add=True)  # the model has no biases
    with tempfile.TemporaryDirectory() as folder:
        config = deltaw.TrainConfig(
            out=folder, batch=job.batch, steps=job.steps, valid_share=0.0, samples=0, log_every=1, lr=contestant.lr,
            dtype="bfloat16", overwrite=True, data=deltaw.DataConfig(max_records=4000, template="plain", separator=""),
        )  # fmt: skip
        deltaw.train(job.model, str(Path(job.data) / "train.jsonl"), config, method=method, on_event=clock.follow())


if __name__ == "__main__":
    main()
