"""`nn.MultiheadAttention` over a batch whose rows have adapters of their own: each adapter's rows by themselves. Knows the module
and its inputs, no models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError
from deltaw.layers.ops.rows import Rows, Update
from deltaw.layers.routing import Route

_INPUTS = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal",
)  # fmt: skip


def through_attention(
    rows: Rows,
    route: Route,
    module: nn.MultiheadAttention,
    updates: Mapping[str, Update],
    plain: Callable[..., Any],
    inputs: Sequence[object],
    named: Mapping[str, object],
) -> tuple[Tensor, Tensor | None]:
    """Return the module's output [n, T, d] (or [T, n, d], where it has the time first) and weights, each row's by its own
    adapter.

    `plain` computes the base's. Raises AdapterError for inputs without a row for each.
    """
    values = {**dict(zip(_INPUTS, inputs, strict=False)), **named}
    n, place = len(rows.names), 0 if module.batch_first else 1
    query = values["query"]
    assert isinstance(query, Tensor)
    if query.dim() != 3 or query.shape[place] % n:
        raise AdapterError(
            f"A {type(module).__name__} is given {list(query.shape)}, which is no batch of {n} rows: they cannot have "
            "adapters of their own there. Use one adapter at a time."
        )
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(rows.names):
        groups.setdefault(name, []).append(row)
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for name, members in groups.items():
        taken = {key: _of(members, value, n, _place(key, value, place)) for key, value in values.items()}
        update = updates.get(name) if name is not None else None
        forward = plain if update is None else partial(update.branch, module)
        with route.within(module, name):  # its output projection is read under the same name
            out, attention = forward(**taken)
        outputs.append(out.movedim(place, 0).unflatten(0, (len(members), -1)))
        if attention is not None:
            weights.append(attention.unflatten(0, (len(members), -1)))
    order = torch.tensor([row for members in groups.values() for row in members]).argsort().to(outputs[0].device)
    out = torch.cat(outputs)[order].flatten(0, 1).movedim(0, place)
    return out, torch.cat(weights)[order].flatten(0, 1) if weights else None


def _place(key: str, value: object, place: int) -> int | None:
    """Return the dimension of an input that has the rows; None where all rows share it."""
    if not isinstance(value, Tensor) or (key == "attn_mask" and value.dim() == 2):
        return None
    return place if key in ("query", "key", "value") else 0


def _of(rows: Sequence[int], value: object, n: int, place: int | None) -> object:
    """Return an input's part for these of the n rows."""
    if place is None or not isinstance(value, Tensor):
        return value
    split = value.unflatten(place, (n, -1))
    return split.index_select(place, torch.tensor(rows, device=value.device)).flatten(place, place + 1)
