"""Attach adapters with random values, as if trained, for benchmarks of what comes after training."""

from __future__ import annotations

from typing import Any

import torch

import deltaw


@torch.no_grad()
def attach_random(
    model: Any, *, name: str = "default", targets: str = "all-linear", seed: int = 0, size: float = 0.03
) -> None:
    """Attach an adapter with r = 8 and α = 16 whose A and B are drawn from N(0, size²)."""
    deltaw.attach(model, deltaw.LoRA(rank=8, alpha=16, targets=targets), name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in deltaw.parameters(model, name):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
