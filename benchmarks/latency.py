"""Measure inference with each kind of adapter over the base's time: the paper's Table 1, on SmolLM2-135M.

    python benchmarks/latency.py --model .cache/smollm2

The base, LoRA merged and not (r = 8, all-linear), and Houlsby's, Pfeiffer's and Lin's adapter layers with as many parameters take
turns on one model with random values; results are medians. Passes have batches of 1×128, 16×256 and 32×512 tokens as in the paper
(on a slow machine --lengths 128,128,128); decoding has 1, 16 and 32 rows. Writes results/latency.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import deltaw
import machine
from deltaw import Bottleneck, LoRA
from deltaw.runs.evaluation import latency

METHODS = {
    "LoRA": LoRA(rank=8),
    "Houlsby": Bottleneck(size=34),
    "Pfeiffer": Bottleneck(size=69, kind="pfeiffer"),
    "Lin": Bottleneck(size=69, kind="lin"),
}
# GPT-2 M on a Quadro RTX 8000 (arXiv 2106.09685, Table 1): batch → its length, milliseconds of the base, ratios of the others
PAPER = {
    1: {"rows×tokens": "1×128", "base_ms": 19.8, "Lin": 1.207, "Houlsby": 1.303},
    16: {"rows×tokens": "16×256", "base_ms": 338.0, "Lin": 1.050, "Houlsby": 1.084},
    32: {"rows×tokens": "32×512", "base_ms": 1449.4, "Lin": 1.022, "Houlsby": 1.030},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--large", action=argparse.BooleanOptionalAction, default=True, help="batches of 16 and 32 rows"
    )
    parser.add_argument(
        "--lengths", default="128,256,512", help="tokens of a row for 1, 16 and 32 rows; default: the paper's"
    )
    chosen = parser.parse_args()
    sizes = list(zip(PAPER, map(int, chosen.lengths.split(",")), strict=True))
    model: Any = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    counts = {name: attach_random(model, name, method) for name, method in METHODS.items()}
    ways = latency.ways(model, list(METHODS), merged=["LoRA"])
    rows = []
    for batch, length in sizes if chosen.large else sizes[:1]:
        rounds = min(chosen.rounds, {1: 9, 16: 5, 32: 3}[batch])  # a round of the largest takes minutes
        found = latency.measure(ways, latency.forward(model, batch, length), rounds=rounds)
        rows.append(row("forward", f"{batch}×{length}", found, PAPER[batch]))
    for batch in (1, 16, 32) if chosen.large else (1,):
        found = latency.measure(ways, latency.decoding(model, batch), rounds=chosen.rounds)
        rows.append(row("8 decode steps", str(batch), found, None))
    machine.write("latency", {
        "model": "SmolLM2-135M-Instruct, float32", "parameters": counts, "ratios": "over the base's time in the same round",
        "paper": "GPT-2 M on a GPU, arXiv 2106.09685, Table 1", "rows": rows,
    })  # fmt: skip


def attach_random(model: Any, name: str, method: Any) -> int:
    """Random values, so that merging is no special case; the number of parameters."""
    deltaw.attach(model, method, name=name)
    own = deltaw.parameters(model, name)
    with torch.no_grad():
        for i, parameter in enumerate(own):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.01)
            parameter.requires_grad_(False)
    return sum(p.numel() for p in own)


def row(what: str, size: str, found: latency.Latency, paper: dict[str, Any] | None) -> dict[str, Any]:
    made = {
        "what": what, "rows×tokens" if "×" in size else "rows": size, "base_ms": round(found.seconds[latency.BASE] * 1e3, 2),
        "ratios": {name: round(r, 3) for name, r in found.ratios.items() if name != latency.BASE},
        **({"paper": paper} if paper else {}),
    }  # fmt: skip
    print(made, flush=True)
    return made


if __name__ == "__main__":
    main()
