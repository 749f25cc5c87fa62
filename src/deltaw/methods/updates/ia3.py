"""(IA)³'s update of one layer: its outputs, or its inputs, times a trained vector (Liu et al. 2022, arXiv 2205.05638, §3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltaw.layers.kinds import as_stored, kind_of, shape, why_not
from deltaw.layers.ops.merging import Change, Times
from deltaw.layers.patch import only_input
from deltaw.layers.unwrap import itself, own_forward
from deltaw.methods.updates.base import Sums, Update


class Scaled(Update):
    """l ⊙ (W0x + b), or W0(l ⊙ x) + b with `inputs`.

    l is [d], or [k] with `inputs`. With `rows` [n] it is [n], of these outputs alone: a slice of a fused layer.
    """

    own_sum = True
    done_to_layer = "scaled"
    rows: Tensor | None

    def __init__(self, l: Tensor, *, inputs: bool = False, rows: Tensor | None = None) -> None:  # noqa: E741
        super().__init__()
        self.inputs = inputs
        self.l = nn.Parameter(l)
        self.register_buffer("rows", rows, persistent=False)

    def whole(self, layer: nn.Module) -> Tensor:
        """Return l of all of the layer's outputs or inputs, [d] or [k]: 1 where the update has none."""
        if self.rows is None:
            return self.l
        return self.l.new_ones(shape(layer)[0]).index_put((self.rows,), self.l)

    def branch(self, layer: nn.Module, *inputs: Tensor, **named: Tensor) -> Tensor:
        """x [..., k] → [..., d]."""
        x, forward = only_input(layer, inputs, named), own_forward(layer)
        l = self.whole(layer).to(x.dtype)  # noqa: E741
        plain = itself(layer)
        out: Tensor = forward(plain, x * l) if self.inputs else forward(plain, x) * l
        return out

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        l = self.whole(layer).detach()  # noqa: E741
        if self.inputs:
            return {"weight": Times(columns=l)}
        changes: dict[str, Change] = {"weight": Times(rows=l)}
        return changes if layer._parameters.get("bias") is None else changes | {"bias": Times(columns=l)}

    def parameter(self, layer: nn.Module, own_name: str) -> Tensor | None:
        value = super().parameter(layer, own_name)
        if value is None or own_name not in ("weight", "bias") or (self.inputs and own_name == "bias"):
            return value
        l = self.whole(layer).to(value.dtype)  # noqa: E741
        if own_name == "bias":
            return value * l
        kind = kind_of(layer)
        assert kind is not None
        return as_stored(layer, own_name, kind.W0(layer) * (l if self.inputs else l[:, None]))

    def why_no_sum(self, other: Update) -> str | None:
        if isinstance(other, Scaled) and other.inputs is not self.inputs:
            return "some of the adapters scale its inputs, others its outputs; merge(model, weights=…) can add them up"
        return super().why_no_sum(other)

    def summed(self, layer: nn.Module, terms: Sequence[tuple[Update, float]], sums: Sums) -> Scaled:
        """Return l = 1 + Σ weight·(l − 1), since ΔW = (l − 1) ⊙ W0. Slices stay slices where all terms have the same one."""
        scaled = [(update, weight) for update, weight in terms if isinstance(update, Scaled)]
        rows = self.rows
        alike = rows is not None and all(u.rows is not None and rows.equal(u.rows) for u, _ in scaled)
        vectors = [(u.l if alike else u.whole(layer), weight) for u, weight in scaled]
        total = torch.ones_like(vectors[0][0])
        for vector, weight in vectors:
            total += weight * (vector - 1)
        return Scaled(total, inputs=self.inputs, rows=rows if alike else None)

    def misfit(self, layer: nn.Module) -> str | None:
        if why := why_not(layer):
            return why
        kind = kind_of(layer)
        if kind is None or not kind.multiplies:
            return f"(IA)³ has a form for dense layers alone, and this is a {type(layer).__name__}"
        d, k = shape(layer)
        n = len(self.l) if self.rows is None else d
        expected = k if self.inputs else d
        return None if n == expected else f"its vector has {n} entries, the layer {expected}"

    def moved(self, layer: nn.Module) -> tuple[float, float]:
        kind = kind_of(layer)
        assert kind is not None
        W0, l = kind.W0(layer), self.whole(layer).detach()  # noqa: E741
        squares = W0.float().square().sum(0 if self.inputs else 1)
        return float(((l - 1).float().square() * squares).sum()), float(squares.sum())


def ones(n: int, like: Tensor) -> Tensor:
    """Return the vector [n] that (IA)³ starts from: fp32 (float64 beside float64), on the device of `like`."""
    return torch.ones(n, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
