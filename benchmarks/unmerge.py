"""Count the weights that differ after a merge and an unmerge: deltaw and PEFT, the same adapter, in each precision.

    python benchmarks/unmerge.py --model .cache/smollm2

Writes results/unmerge.json: the share of targeted weights whose bits differ after one merge and unmerge, and the seconds of
each, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

import deltaw
import machine
from adapters import attach_random


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    rows = [measure(chosen.model, dtype, chosen.rounds) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    machine.write("unmerge", {"model": "SmolLM2-135M-Instruct", "adapter": "all-linear, r = 8", "rows": rows})


def measure(source: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One precision: both tools merge and unmerge the same adapter, in turn."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    twin = copy.deepcopy(model)
    attach_random(model)
    with tempfile.TemporaryDirectory() as folder:
        deltaw.save(model, Path(folder) / "a")
        theirs = peft.PeftModel.from_pretrained(twin, Path(folder) / "a")
    originals = {n: p.detach().clone() for n, p in model.named_parameters() if ".deltaw." not in n}
    ours_times: list[tuple[float, float]] = []
    their_times: list[tuple[float, float]] = []
    ours_changed = theirs_changed = report = None
    for _ in range(rounds):
        start = time.perf_counter()
        report = deltaw.merge(model)
        middle = time.perf_counter()
        deltaw.unmerge(model)
        ours_times.append((middle - start, time.perf_counter() - middle))
        start = time.perf_counter()
        theirs.merge_adapter()
        middle = time.perf_counter()
        theirs.unmerge_adapter()
        their_times.append((middle - start, time.perf_counter() - middle))
        if ours_changed is None:
            targeted = {f"{n}.weight" for n in report.layers}
            after = dict(model.named_parameters())
            ours_changed = share({n: after[n] for n in targeted}, originals)
            found = {
                n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in theirs.named_parameters()
            }
            theirs_changed = share({n: found[n] for n in targeted}, originals)
    assert report is not None
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "relative_norm": report.relative,
        "changed_deltaw": ours_changed,
        "changed_peft": theirs_changed,
        "seconds_deltaw": medians(ours_times),
        "seconds_peft": medians(their_times),
    }


def share(found: dict[str, torch.Tensor], originals: dict[str, torch.Tensor]) -> float:
    """Share of entries whose value differs."""
    differ = sum(int((found[n] != originals[n]).sum()) for n in found)
    return differ / sum(p.numel() for p in found.values())


def medians(times: list[tuple[float, float]]) -> dict[str, float]:
    return {"merge": statistics.median(m for m, _ in times), "unmerge": statistics.median(u for _, u in times)}


if __name__ == "__main__":
    main()
