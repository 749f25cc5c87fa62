"""Which attention a training run uses: the model's own, but for short rows in bfloat16 on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# Up to here plain products are faster there than torch's fused kernel, and their [rows, rows] scores are small beside the
# other activations. Measured: SmolLM2, 8 rows of 50–60 tokens, a step takes 1.0 s instead of 1.3 s.
_SHORT = 128


@contextlib.contextmanager
def short_row_attention(model: Any, longest: int) -> Iterator[None]:
    """While open, a bfloat16 model on a CPU whose rows have at most 128 tokens computes attention by plain products."""
    config = getattr(model, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    parameter = next(model.parameters())
    slow = parameter.device.type == "cpu" and parameter.dtype == torch.bfloat16 and longest <= _SHORT
    if not slow or chosen != "sdpa":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)
