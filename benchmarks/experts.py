"""Measure a training step of a mixture's experts with A and B on each, over the frozen block's forward and dx.

    python benchmarks/experts.py                                              # a Qwen3-30B-A3B block at a quarter of its widths
    python benchmarks/experts.py --hidden 2048 --intermediate 768 --tokens 4096 --dtype bfloat16 --name experts_gpu   # as it is

One mixture block (128 experts, 8 a token) has r = 8 on both stacks of its experts. It runs forward and backward with the
gradient of its input, in each way in which transformers runs experts. The rows: `floor` (no adapter), `deltaw`, `formed`
(deltaw with W0 + ΔW formed in each pass), `peft` (its target_parameters).

Times come from one process, in turns that begin with another row each time: medians, and the median ratio to `formed` of the
same turn. Memory is the most that a process of its own holds in a step above what it held before. Outputs and gradients are
compared with those of `formed` before anything is timed. Unsloth's published figures for GPUs stand beside them: 2 × over
grouped_mm's speed and 35% less memory. Writes results/experts.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import peft
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import deltaw
import machine
import own_process
from deltaw.methods.updates.weights import Stack

WAYS = ("floor", "deltaw", "formed", "peft")
RANK, ALPHA = 8, 16
# Different ones, in turn; each is seen once before anything is timed
BATCHES = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """The mixture alone, under the name that it has in a model."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=shape["hidden"], moe_intermediate_size=shape["intermediate"], num_experts=shape["experts"],
            num_experts_per_tok=shape["top"], norm_topk_prob=True,
        )  # fmt: skip
        config._experts_implementation = shape["implementation"]
        self.mlp = Qwen3MoeSparseMoeBlock(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.mlp(x)
        return out[0] if isinstance(out, tuple) else out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=192)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm", "eager"])
    parser.add_argument("--name", default="experts", help="of the result file")
    parser.add_argument("--worker", help="measure the memory of one way, told as JSON")
    chosen = parser.parse_args()
    if chosen.worker:
        print(json.dumps(memory_of(**json.loads(chosen.worker))))
        return
    shape = {key: getattr(chosen, key) for key in ("hidden", "intermediate", "experts", "top", "tokens", "dtype")}
    # One expert after the other, the formed and PEFT's take half a minute a step: the gradient of each is a whole stack
    rounds = {one: chosen.rounds if one != "eager" else min(3, chosen.rounds) for one in chosen.implementations}
    rows = [row(shape | {"implementation": one}, n) for one, n in rounds.items()]
    published = {"time_over_grouped_mm": 0.5, "memory_over_grouped_mm": 0.65}
    machine.write(
        chosen.name, {**shape, "rank": RANK, "device": DEVICE, "rows": rows, "unsloth_publishes_on_gpus": published}
    )


def row(shape: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One way of running experts: times, memory, and ratios to `formed`."""
    blocks = {way: block_of(way, shape) for way in WAYS}
    differences = compared(blocks["deltaw"], blocks["formed"], shape)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + BATCHES):
        for i in range(len(WAYS)):
            way = WAYS[(turn + i) % len(WAYS)]
            began = time.perf_counter()
            step(way, blocks[way], shape, seed=turn % BATCHES)
            if turn >= BATCHES:  # below 32 bits a CPU compiles kernels for each number of tokens
                times[way].append(time.perf_counter() - began)
    memory = {way: own_process.run(__file__, {"way": way, "shape": shape})["bytes"] for way in WAYS}
    ratios = {way: statistics.median(a / b for a, b in zip(times[way], times["formed"], strict=True)) for way in WAYS}
    over = statistics.median(a / b for a, b in zip(times["deltaw"], times["floor"], strict=True))
    result = {
        "implementation": shape["implementation"],
        "seconds": {way: round(statistics.median(values), 5) for way, values in times.items()},
        "time_over_formed": {way: round(ratio, 3) for way, ratio in ratios.items()},
        "deltaw_over_floor": round(over, 3),
        "step_bytes": memory,
        "memory_over_formed": {way: round(memory[way] / memory["formed"], 3) for way in WAYS},
        "largest_difference_from_formed": differences,
    }
    print(json.dumps(result), flush=True)
    return result


def block_of(way: str, shape: dict[str, Any]) -> nn.Module:
    """The block with its adapter: A random, B as after some steps; the same values in every way."""
    torch.manual_seed(0)
    block: Any = Block(shape).to(DEVICE, getattr(torch, shape["dtype"])).train().requires_grad_(False)
    if way in ("deltaw", "formed"):
        deltaw.attach(block, deltaw.LoRA(rank=RANK, alpha=ALPHA, targets="experts.gate_up_proj,experts.down_proj"))
    elif way == "peft":
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
        block = peft.get_peft_model(block, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return block


def step(way: str, block: nn.Module, shape: dict[str, Any], *, seed: int) -> torch.Tensor:
    """Forward and backward; the output."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, shape["dtype"])
    x, g = (torch.randn(1, shape["tokens"], shape["hidden"], generator=generator).to(DEVICE, dtype) for _ in "xg")
    x.requires_grad_(True)
    stand_in = Stack.stand_in
    if way == "formed":
        Stack.stand_in = Stack.weight  # type: ignore[method-assign]
    try:
        for parameter in block.parameters():
            parameter.grad = None
        out: torch.Tensor = block(x)
        out.backward(g)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    finally:
        Stack.stand_in = stand_in  # type: ignore[method-assign]
    return out.detach()


def compared(one: nn.Module, other: nn.Module, shape: dict[str, Any]) -> dict[str, float]:
    """The largest difference in the outputs and in the gradients, over the largest entry."""
    outputs = [step(way, block, shape, seed=0) for way, block in (("deltaw", one), ("formed", other))]
    gradients = [
        torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None]) for block in (one, other)
    ]
    pairs = {"output": outputs, "gradients": gradients}
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def memory_of(way: str, shape: dict[str, Any]) -> dict[str, int]:
    """Bytes that this process holds at most in two steps, above what it held before."""
    block = block_of(way, shape)
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        small = shape | {"tokens": 8, "experts": 8}
        step("floor", block_of("floor", small), small, seed=0)  # libraries take their own
        before = own_process.held("VmRSS")
    for seed in (0, 1):
        step(way, block, shape, seed=seed)
    most = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else own_process.held("VmHWM")
    return {"bytes": most - before}


if __name__ == "__main__":
    main()
