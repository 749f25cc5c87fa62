"""Measure what a run's state takes: the time that the loop waits for one, the time until it is on disk, its size.

    python benchmarks/states.py --data DATA/e2e

SmolLM2, all-linear, r = 8, a state after each of 30 steps. `train_step.py --part states` measures the tokens/s with and without.
Writes results/states.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import deltaw
import machine
from deltaw.model import attach
from deltaw.training.keeper import NEWEST, Keeper, Place, read_states
from deltaw.training.loop import Loop, LoopPlan, run_loop
from deltaw.training.prepare import prepare
from deltaw.training.tasks import task_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with E2E's train.jsonl")
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--steps", type=int, default=30)
    chosen = parser.parse_args()
    config = deltaw.TrainConfig(
        lr=5e-4,
        steps=chosen.steps,
        batch=8,
        valid_share=0.0,
        data=deltaw.DataConfig(max_records=2000, template="plain", separator=""),
    )
    method = deltaw.LoRA(rank=8)
    prepared = prepare(chosen.model, str(Path(chosen.data) / "train.jsonl"), config, method)
    attach.attach(prepared.loaded.model, method)
    plan = LoopPlan(task_of(prepared.config.data).loss(prepared.loaded), prepared.encoded.examples, (), prepared.config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keeper = Keeper({"default": Place(folder, dict)}, every=1, on_error=print)
        waited: list[float] = []
        whole: list[float] = []

        def keep(loops: Sequence[Loop], *, now: bool) -> None:
            began = time.perf_counter()
            keeper(loops, now=False)
            waited.append(1e3 * (time.perf_counter() - began))
            keeper.wait()
            whole.append(1e3 * (time.perf_counter() - began))

        state = run_loop(plan, keep=keep)
        began = time.perf_counter()
        assert read_states(folder)[0].saved.step == state.step
        read = 1e3 * (time.perf_counter() - began)
        size = (folder / NEWEST).stat().st_size
    machine.write(
        "states",
        {
            "model": "SmolLM2-135M-Instruct", "adapter": "all-linear, r = 8", "state_mb": size / 1e6,
            "loop_waits_ms": statistics.median(waited[2:]), "most_ms": max(waited[2:]),
            "on_disk_ms": statistics.median(whole[2:]), "read_both_ms": read, "step_ms": 1e3 * state.step_seconds / state.step,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
