"""The attention of a training run: the model's, except for short rows in bfloat16 on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

# Up to here plain products are faster there than torch's fused kernel, and their [rows, rows] scores are small beside the
# other activations. Measured: SmolLM2, 8 rows of 50–60 tokens, a step takes 1.0 s instead of 1.3 s.
_SHORT = 128
_NAME = "deltaw_short_rows"


@contextlib.contextmanager
def short_row_attention(model: nn.Module, longest: int, device: str | None = None) -> Iterator[None]:
    """Compute attention by plain products, while open, in a bfloat16 model on a CPU whose rows have at most 128 tokens.

    longest: tokens of the longest row. device: the type of the device, "cpu" or "cuda"; None: the model's.
    """
    config = getattr(model, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    parameter = next(model.parameters())
    slow = (device or parameter.device.type) == "cpu" and parameter.dtype == torch.bfloat16 and longest <= _SHORT
    choose: Callable[[str], None] | None = getattr(model, "set_attn_implementation", None)
    if not slow or chosen != "sdpa" or choose is None:
        yield
        return
    choose(_NAME)
    try:
        yield
    finally:
        choose("sdpa")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: object,
) -> tuple[Tensor, None]:
    """Return softmax(QKᵀ·scaling + mask)V by plain products, as transformers' attention interface asks for it.

    query [n, heads, t, e]; key and value [n, key heads, s, e]; mask [n, 1, t, s], added → [n, t, heads, e]. A key head serves
    several query heads, whose rows are concatenated, so that no copy of key or value is made.
    """
    n, heads, t, e = query.shape
    groups = key.shape[1]
    scaling = e**-0.5 if scaling is None else scaling
    rows = query.reshape(n, groups, -1, e) * scaling
    scores = (rows @ key.transpose(2, 3)).view(n, groups, heads // groups, t, -1)
    if attention_mask is not None:
        scores = scores.add_(attention_mask[:, :, None, :, : scores.shape[-1]])
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    out = weights.view(n, groups, -1, weights.shape[-1]) @ value
    return out.view(n, heads, t, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, attention)
AttentionMaskInterface.register(_NAME, eager_mask)
