"""Measure what a sweep saves against training its candidates one by one: time, and the peak of memory.

    python benchmarks/sweep.py --model .cache/smollm2      # on a GPU: --dtype bfloat16 --name sweep_gpu

Eight ranks over the quickstart's requests are trained in several ways in turn, each in its own processes. `train` takes a process
for each rank. A sweep's candidates take turns over one base, or several share one pass. "steps" is the time in training steps,
"whole" all time from the start of Python. Eight processes side by side would take eight times the memory of one. Writes
results/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import own_process

HERE = Path(__file__).resolve().parent
RANKS = (8, 1, 2, 3, 4, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parent / ".cache" / "smollm2"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--name", default="sweep", help="of the result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        print(json.dumps(worked(json.loads(chosen.worker))))
        return
    import machine

    sys.path.insert(0, str(HERE.parent / "examples" / "quickstart"))
    import toolcalls

    rounds = []
    with tempfile.TemporaryDirectory() as place:
        toolcalls.write(Path(place) / "data", train=chosen.steps * chosen.batch, valid=8, test=8, seed=0)
        for number in range(chosen.rounds):
            rounds.append(measured(chosen, Path(place), number))
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    ways = {way: {k: statistics.median(r[way][k] for r in rounds) for k in rounds[0][way]} for way in rounds[0]}
    alone = ways["one by one"]
    ratios = {
        way: {k: round(found[k] / alone[k], 3) for k in ("steps", "whole", "peak")} for way, found in ways.items()
    }
    machine.write(chosen.name, {
        "model": Path(chosen.model).name, "ranks": RANKS, "steps": chosen.steps, "batch": chosen.batch, "dtype": chosen.dtype,
        "rounds": chosen.rounds, "medians": ways, "over one by one": ratios,
        "eight side by side would peak at": 8 * alone["peak"],
    })  # fmt: skip


def measured(chosen: argparse.Namespace, place: Path, number: int) -> dict[str, dict[str, float]]:
    """Seconds and bytes of each way."""
    told = {
        "model": chosen.model,
        "data": str(place / "data"),
        "steps": chosen.steps,
        "batch": chosen.batch,
        "dtype": chosen.dtype,
    }
    alone = [run(told | {"rank": rank, "out": str(place / f"{number}-{rank}")}) for rank in RANKS]
    found = {
        "one by one": {k: sum(a[k] for a in alone) for k in ("steps", "whole")}
        | {"peak": max(a["peak"] for a in alone)}
    }
    for width in chosen.widths:
        name = "sweep, in turn" if width == 1 else f"sweep, {width} in one pass"
        found[name] = run(told | {"width": width, "out": str(place / f"{number}-sweep-{width}")})
    return found


def run(told: dict[str, Any]) -> dict[str, float]:
    """What `worked` says in a process of its own, and how long all of that took."""
    began = time.monotonic()
    found = own_process.run(__file__, told)
    return {"steps": found["steps"], "whole": time.monotonic() - began, "peak": found["peak"]}


def worked(told: dict[str, Any]) -> dict[str, float]:
    """One rank trained, or all of them in a sweep."""
    import torch

    import deltaw

    config = deltaw.TrainConfig(
        data=deltaw.DataConfig(template="chat"), out=told["out"], steps=told["steps"], batch=told["batch"], dtype=told["dtype"],
        eval_every=told["steps"], samples=0,
    )  # fmt: skip
    if "rank" in told:
        method = deltaw.LoRA(rank=told["rank"], alpha=8.0)
        steps = deltaw.train(told["model"], told["data"], config, method=method).state.step_seconds
    else:
        options = deltaw.SweepConfig(ranks=",".join(map(str, RANKS)), abreast=told["width"], metrics="loss")
        rows = deltaw.sweep(told["model"], told["data"], config, options).results["rows"]
        steps = sum(row["step_seconds"] * told["steps"] for row in rows)
    return {
        "steps": steps,
        "peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else own_process.held("VmHWM"),
    }


if __name__ == "__main__":
    main()
