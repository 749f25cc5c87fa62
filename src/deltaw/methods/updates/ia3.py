"""(IA)³'s update of one layer: its outputs, or its inputs, times a trained vector (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaw.layers.kinds import as_stored, kind_of, shape, why_not
from deltaw.layers.ops.merging import Change, Times
from deltaw.layers.patch import only_input
from deltaw.layers.unwrap import itself, own_forward
from deltaw.methods.updates.base import Update


class Scaled(Update):
    """(IA)³ (Liu et al. 2022, arXiv 2205.05638): l ⊙ (W0x + b), or W0(l ⊙ x) + b with `inputs`. With `rows` l [n] is of those of
    the d outputs alone, a slice of a fused layer; else it is [d], or [k] with `inputs`."""

    rows: Tensor | None

    def __init__(self, l: Tensor, *, inputs: bool = False, rows: Tensor | None = None) -> None:  # noqa: E741
        super().__init__()
        self.inputs = inputs
        self.l = nn.Parameter(l)
        self.register_buffer("rows", rows, persistent=False)

    def whole(self, layer: Any) -> Tensor:
        """l of all of the layer's outputs or inputs: 1 where it has none."""
        if self.rows is None:
            return self.l
        return self.l.new_ones(shape(layer)[0]).index_put((self.rows,), self.l)

    def branch(self, layer: Any, *inputs: Any, **named: Any) -> Tensor:
        """x [..., k] → [..., d]."""
        x, forward = only_input(layer, inputs, named), own_forward(layer)
        l = self.whole(layer).to(x.dtype)  # noqa: E741
        own = itself(layer)
        return forward(own, x * l) if self.inputs else forward(own, x) * l

    def changes(self, layer: Any) -> dict[str, Change]:
        l = self.whole(layer).detach()  # noqa: E741
        if self.inputs:
            return {"weight": Times(columns=l)}
        changes: dict[str, Change] = {"weight": Times(rows=l)}
        return changes if layer._parameters.get("bias") is None else changes | {"bias": Times(columns=l)}

    def parameter(self, layer: Any, own_name: str) -> Tensor | None:
        own = super().parameter(layer, own_name)
        if own is None or own_name not in ("weight", "bias") or (self.inputs and own_name == "bias"):
            return own
        l = self.whole(layer).to(own.dtype)  # noqa: E741
        if own_name == "bias":
            return own * l
        kind = kind_of(layer)
        assert kind is not None
        return as_stored(layer, own_name, kind.W0(layer) * (l if self.inputs else l[:, None]))

    def misfit(self, layer: Any) -> str | None:
        if why := why_not(layer):
            return why
        kind = kind_of(layer)
        if kind is None or not kind.multiplies:
            return f"a {type(layer).__name__} has no form of (IA)³ here: dense layers alone have"
        d, k = shape(layer)
        n = len(self.l) if self.rows is None else d
        expected = k if self.inputs else d
        return None if n == expected else f"its vector has {n} entries, the layer {expected}"

    def moved(self, layer: Any) -> tuple[float, float]:
        kind = kind_of(layer)
        assert kind is not None
        W0, l = kind.W0(layer), self.whole(layer).detach()  # noqa: E741
        squares = W0.float().square().sum(0 if self.inputs else 1)
        return float(((l - 1).float().square() * squares).sum()), float(squares.sum())


def ones(n: int, like: Tensor) -> Tensor:
    """Where (IA)³ starts: fp32 (float64 beside float64), on the device of `like`."""
    return torch.ones(n, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
