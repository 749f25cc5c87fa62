"""Merge and unmerge an adapter 1,000 times: the bits that differ then, and the time of a cycle, deltaw beside PEFT.

    python benchmarks/merge_cycles.py                                   # both parts
    python benchmarks/merge_cycles.py --against CHECKOUT                # times beside the deltaw of another checkout, too
    python benchmarks/merge_cycles.py --cycles 50 --part drift --drift-model .cache/smollm2
    python benchmarks/merge_cycles.py --part time --turns 9

The drift is counted on one layer of SmolLM2's shapes with random weights, or on --drift-model, in three dtypes, with the same A
and B for both tools. It is the mean |W − W0| of the targeted weights over their mean |W0|. Times are of --model in
bfloat16: every row has a process of its own, and the rows take turns, a cycle each. A ratio is the median over the turns.
Wall times depend on who else uses the machine; CPU times do less.

Writes results/merge_cycles.json with machine and versions.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DTYPES = ("float32", "bfloat16", "float16")
KEEPS: tuple[Any, ...] = ("copy", "correction")
ADAPTER = "all-linear, r = 8"
Turn = dict[str, float]


def main() -> None:
    chosen = arguments()
    if chosen.worker:
        work(**json.loads(chosen.worker))
        return
    import machine

    result: dict[str, Any] = {"adapter": ADAPTER}
    if chosen.part != "time":
        result["drift"] = [drift(dtype, chosen.drift_model, chosen.cycles) for dtype in DTYPES]
    if chosen.part != "drift":
        result["time"] = [race(chosen, threads) for threads in chosen.threads]
    machine.write(chosen.name, result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parent / ".cache" / "smollm2"), help="whose cycles are timed")
    parser.add_argument("--drift-model", help="whose weights are compared; default: one layer with random weights")
    parser.add_argument("--cycles", type=int, default=1000, help="before the weights are compared")
    parser.add_argument("--turns", type=int, default=7, help="timed cycles of each row, after one that is not")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="of PyTorch; 0: its default")
    parser.add_argument("--keep", nargs="+", choices=KEEPS, default=KEEPS, help="what the timed merges keep")
    parser.add_argument("--part", choices=("drift", "time", "both"), default="both")
    parser.add_argument("--against", metavar="CHECKOUT", help="time the deltaw of another checkout, too")
    parser.add_argument("--name", default="merge_cycles", help="of the result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- drift --------------------------------------------------------------------------------------------------------


def drift(dtype: str, source: str | None, cycles: int) -> dict[str, Any]:
    """Return how the targeted weights differ after so many cycles, of deltaw and of PEFT."""
    import torch

    model: Any = opened(source, dtype) if source else one_layer(dtype)
    ours, theirs = both(model)
    originals = {n: p.detach().clone() for n, p in ours.named_parameters()}
    names = targeted(ours)
    before = {n: originals[n] for n in names}
    for _ in range(cycles):
        cycle_of_deltaw(ours)
    for _ in range(cycles):
        cycle_of_peft(theirs)
    ours_after = {n: ours.get_parameter(n).detach() for n in names}
    their_layers = theirs.base_model.model
    theirs_after = {
        n: their_layers.get_parameter(n.removesuffix("weight") + "base_layer.weight").detach() for n in names
    }
    integers = torch.int32 if dtype == "float32" else torch.int16

    def figures(after: dict[str, Any]) -> dict[str, float]:
        bits = sum(ones(before[n].view(integers) ^ after[n].view(integers)) for n in names)
        mean = sum(float(before[n].double().abs().sum()) for n in names)
        moved = sum(float((after[n].double() - before[n].double()).abs().sum()) for n in names)
        return {"bits_changed": bits, "drift_over_mean_weight": moved / mean}

    row = {
        "dtype": dtype, "model": "SmolLM2-135M-Instruct" if source else "one layer of SmolLM2's shapes", "cycles": cycles,
        "weights": sum(w.numel() for w in before.values()), "deltaw": figures(ours_after), "peft": figures(theirs_after),
    }  # fmt: skip
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def ones(words: Any) -> int:
    """Count the bits that are set."""
    import numpy

    return int(numpy.unpackbits(words.contiguous().numpy().view(numpy.uint8)).sum(dtype=numpy.int64))


def one_layer(dtype: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from shapes import LLAMA

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA["smollm2-135m"] | {"num_hidden_layers": 1, "vocab_size": 512})
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def opened(source: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()


def both(model: Any) -> tuple[Any, Any]:
    """Return the model with an adapter, and a twin with the same one by PEFT."""
    import peft

    import deltaw
    from adapters import attach_random

    twin = copy.deepcopy(model)
    attach_random(model)
    with tempfile.TemporaryDirectory() as folder:
        deltaw.save(model, Path(folder) / "a")
        return model, peft.PeftModel.from_pretrained(twin, Path(folder) / "a")


def targeted(model: Any) -> list[str]:
    """Return the names of the weights that a merge changes."""
    import deltaw

    layers = deltaw.merge(model).layers
    deltaw.unmerge(model)
    return [f"{layer}.weight" for layer in layers]


def cycle_of_deltaw(model: Any, keep: Any = "copy") -> Turn:
    import deltaw

    return timed(lambda: deltaw.merge(model, keep=keep), lambda: deltaw.unmerge(model))


def cycle_of_peft(model: Any) -> Turn:
    return timed(model.merge_adapter, model.unmerge_adapter)


# --- time ---------------------------------------------------------------------------------------------------------


def timed(merge: Callable[[], object], unmerge: Callable[[], object]) -> Turn:
    """Return the seconds of a cycle's two halves, by the clock and of all processors."""
    clocks = [(time.perf_counter(), time.process_time())]
    for half in (merge, unmerge):
        half()
        clocks.append((time.perf_counter(), time.process_time()))
    (wall, cpu), (wall_merged, cpu_merged), (wall_end, cpu_end) = clocks
    return {
        "merge_s": wall_merged - wall, "unmerge_s": wall_end - wall_merged, "cycle_s": wall_end - wall,
        "merge_cpu_s": cpu_merged - cpu, "unmerge_cpu_s": cpu_end - cpu_merged, "cycle_cpu_s": cpu_end - cpu,
    }  # fmt: skip


def race(chosen: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Let the rows take turns: a process for each tool, which keeps copies in some rows and corrections in others."""
    tools = {"deltaw": ("deltaw", None)}
    if chosen.against:
        tools["deltaw before"] = ("deltaw", chosen.against)
    tools["peft"] = ("peft", None)
    workers = {name: Worker(tool, chosen.model, threads, checkout) for name, (tool, checkout) in tools.items()}
    rows = [(name, keep) for keep in chosen.keep for name in tools if keep == "copy" or name != "peft"]
    turns: dict[tuple[str, str], list[Turn]] = {row: [] for row in rows}
    for number in range(chosen.turns + 1):
        for name, keep in rows[:: 1 if number % 2 == 0 else -1]:  # who goes first takes turns, too
            turns[name, keep].append(workers[name].turn(keep))
    hashes = {name: worker.end() for name, worker in workers.items()}
    figures: dict[str, dict[str, Any]] = {keep: {} for keep in chosen.keep}
    for (name, keep), taken in turns.items():
        others = {other: turns[other, keep][1:] for other in tools if other != name and (other, keep) in turns}
        figures[keep][name] = summary(taken[1:], others)
    result = {
        "threads": threads or "default", "dtype": "bfloat16", "turns": chosen.turns, "sha256": hashes, "keep": figures
    }  # fmt: skip
    print(json.dumps(result, indent=1), file=sys.stderr, flush=True)
    return result


def summary(taken: list[Turn], others: dict[str, list[Turn]]) -> dict[str, Any]:
    """Return a row's medians, and its cycle's time over that of each other row."""
    figures: dict[str, Any] = {key: round(statistics.median(t[key] for t in taken), 4) for key in taken[0]}
    for key in ("cycle_s", "cycle_cpu_s"):
        figures[f"{key}_over"] = {
            other: round(statistics.median(a[key] / b[key] for a, b in zip(taken, theirs, strict=True)), 3)
            for other, theirs in others.items()
        }
    return figures


class Worker:
    """A process with a model and its adapter, which does a cycle when it is told to."""

    def __init__(self, tool: str, model: str, threads: int, checkout: str | None) -> None:
        env = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        env["PYTHONPATH"] = str(Path(checkout or HERE.parent).resolve() / "src")
        env.pop("OMP_NUM_THREADS", None)
        if threads:
            env["OMP_NUM_THREADS"] = str(threads)
        job = {"tool": tool, "model": str(Path(model).resolve())}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.heard()

    def turn(self, keep: str) -> Turn:
        assert self.process.stdin
        self.process.stdin.write(f"{keep}\n")
        self.process.stdin.flush()
        return self.heard()

    def end(self) -> dict[str, str]:
        """Return the hashes of the targeted weights, merged and after all cycles."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.heard()

    def heard(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a row ended with code {self.process.wait()}")
        return json.loads(line)


def work(tool: str, model: str) -> None:
    """Do a worker's whole work: a cycle for each line that comes in."""
    import deltaw

    ours, theirs = both(opened(model, "bfloat16"))
    names = targeted(ours)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        taken = cycle_of_deltaw(ours, line.strip()) if tool == "deltaw" else cycle_of_peft(theirs)
        print(json.dumps(taken), flush=True)
    ends = {}
    if tool == "deltaw":
        ends["restored"] = digest(ours, names)
        for keep in KEEPS:
            deltaw.merge(ours, keep=keep)
            ends[f"merged, {keep}"] = digest(ours, names)
            deltaw.unmerge(ours)
    print(json.dumps(ends), flush=True)


def digest(model: Any, names: list[str]) -> str:
    import torch

    hashed = hashlib.sha256()
    for name in names:
        hashed.update(model.get_parameter(name).detach().contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


if __name__ == "__main__":
    main()
