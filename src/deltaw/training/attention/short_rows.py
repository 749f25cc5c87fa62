"""Attention of short rows by plain products. Knows tensors alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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
