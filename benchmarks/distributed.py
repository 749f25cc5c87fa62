"""Compare one process with several that share each step: tokens a second, memory of a process, and the losses of each step.

    python benchmarks/distributed.py MODEL DATA --steps 20 --rounds 3

MODEL is a folder, DATA a file of records. `deltaw train` by torchrun on the CPU, in float32, LoRA of rank 8, all linear
layers. The cores are dealt out: one process with all threads, two with half of them each, and so on. Several processes hold the
base whole each, or parts of it (`--shard full`). All with `--share off`, which shards imply. A round runs each once; medians over
rounds.

Writes results/distributed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

_SETTINGS = [
    "--batch",
    "8",
    "--log-every",
    "1",
    "--samples",
    "0",
    "--valid-share",
    "0",
    "--dtype",
    "float32",
    "--share",
    "off",
]


def run(count: int, shard: str, model: str, data: str, steps: int, out: Path) -> dict[str, Any]:
    """Train by so many processes, the base whole in each or dealt out; return speed, memory and the losses of the steps."""
    threads = max(1, (os.cpu_count() or 1) // count)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "deltaw", "train"]
    subprocess.run(
        [*command, model, data, *_SETTINGS, "--shard", shard, "--steps", str(steps), "--out", str(out)],
        check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["processes"] == count
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    taken = [line for line in lines if line["event"] == "step"]
    # The first steps warm up
    speeds = [line["tokens_per_second"] for line in taken[2:]]
    return {
        "threads": threads,
        "tokens_per_second": statistics.median(speeds),
        "peak_memory": result["peak_memory"],
        "losses": [line["loss"] for line in taken],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {
        (count, shard): [] for count in args.processes for shard in ("off", "full") if count > 1 or shard == "off"
    }
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for (count, shard), rounds in runs.items():
                out = Path(folder) / f"{number}_{count}_{shard}"
                rounds.append(run(count, shard, args.model, args.data, args.steps, out))
                print(number, count, shard, {k: v for k, v in rounds[-1].items() if k != "losses"}, flush=True)
    first = next(iter(runs.values()))
    rows = []
    for (count, shard), of_count in runs.items():
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(of_count, first, strict=True)]
        differences = [abs(a - b) / b for a, b in zip(of_count[0]["losses"], first[0]["losses"], strict=True)]
        rows.append(
            {
                "processes": count,
                "shard": shard,
                "threads_each": of_count[0]["threads"],
                "tokens_per_second": round(statistics.median(one["tokens_per_second"] for one in of_count), 1),
                "to_one_process": round(statistics.median(ratios), 3),
                "peak_memory_of_a_process": max(one["peak_memory"] for one in of_count),
                "largest_relative_difference_of_a_loss": max(differences),
            }
        )
    machine.write("distributed", {"steps": args.steps, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
