"""`nn.MultiheadAttention` over a batch whose rows have adapters of their own: each adapter's rows by themselves. Knows the module
and its inputs, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError
from deltaw.layers.ops.rows import Rows
from deltaw.layers.routing import Route

_INPUTS = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal",
)  # fmt: skip


def through_attention(
    rows: Rows,
    route: Route,
    module: nn.MultiheadAttention,
    updates: Mapping[str, Any],
    plain: Any,
    inputs: Sequence[Any],
    named: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The module's output [n, T, d] (or [T, n, d], where it has the time first) and weights, each row's by its own adapter;
    `plain` computes the base's. Raises AdapterError for inputs without a row for each."""
    given = {**dict(zip(_INPUTS, inputs, strict=False)), **named}
    n, place = len(rows.names), 0 if module.batch_first else 1
    if given["query"].dim() != 3 or given["query"].shape[place] % n:
        raise AdapterError(
            f"A {type(module).__name__} is given {list(given['query'].shape)}, which is no batch of {n} rows: they cannot have "
            "adapters of their own there. Use one adapter at a time."
        )
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(rows.names):
        groups.setdefault(name, []).append(row)
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for name, own in groups.items():
        taken = {key: _of(own, value, n, _place(key, value, place)) for key, value in given.items()}
        update = updates.get(name) if name is not None else None
        forward = plain if update is None else partial(update.branch, module)
        with route.within(module, name):  # its output projection is read under the same name
            out, attention = forward(**taken)
        outputs.append(out.movedim(place, 0).unflatten(0, (len(own), -1)))
        if attention is not None:
            weights.append(attention.unflatten(0, (len(own), -1)))
    order = torch.tensor([row for own in groups.values() for row in own]).argsort().to(outputs[0].device)
    out = torch.cat(outputs)[order].flatten(0, 1).movedim(0, place)
    return out, torch.cat(weights)[order].flatten(0, 1) if weights else None


def _place(key: str, value: Any, place: int) -> int | None:
    """The dimension of an input that has the rows; None where all rows share it."""
    if not isinstance(value, Tensor) or (key == "attn_mask" and value.dim() == 2):
        return None
    return place if key in ("query", "key", "value") else 0


def _of(own: Sequence[int], value: Any, n: int, place: int | None) -> Any:
    """An input's part for these of the n rows."""
    if place is None:
        return value
    split = value.unflatten(place, (n, -1))
    return split.index_select(place, torch.tensor(own, device=value.device)).flatten(place, place + 1)
