"""A bottleneck adapter behind a layer or a whole block: h + up·f(down·h). Knows one module, never a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.layers.kinds import kind_of, shape, why_bypassed
from deltaw.layers.ops.merging import Change, delta_norm
from deltaw.layers.unwrap import own_forward
from deltaw.methods.updates.base import Update

Activation = Literal["relu", "gelu", "silu", "tanh"]
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = dict(
    zip(get_args(Activation), (F.relu, F.gelu, F.silu, torch.tanh), strict=True)
)


class Inserted(Update):
    """h ← h + up·f(down·h + b) + c on a module's output h [..., d], the first one of several.

    down [m, d], b [m], up [d, m], c [d]; with `norm`, down reads LayerNorm(h), of weight [d] and bias [d]. All of it is computed
    in h's dtype.
    """

    unmergeable = "a bottleneck adapter has a nonlinearity, which no weight can hold"
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(self, down: Tensor, activation: Activation, *, norm: bool = False) -> None:
        super().__init__()
        m, d = down.shape
        self.activation = activation
        self.down, self.down_bias = nn.Parameter(down), nn.Parameter(down.new_zeros(m))
        self.up, self.up_bias = nn.Parameter(down.new_zeros(d, m)), nn.Parameter(down.new_zeros(d))
        self.norm_weight = nn.Parameter(down.new_ones(d)) if norm else None
        self.norm_bias = nn.Parameter(down.new_zeros(d)) if norm else None

    def branch(self, layer: nn.Module, *inputs: object, **named: object) -> object:
        out = own_forward(layer)(layer, *inputs, **named)
        return (self.added(out[0]), *out[1:]) if isinstance(out, tuple) else self.added(out)

    def added(self, h: Tensor) -> Tensor:
        """Return h [..., d] with the adapter's part."""
        down, b, up, c = (p.to(h.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        read = h
        if self.norm_weight is not None and self.norm_bias is not None:
            read = F.layer_norm(h, h.shape[-1:], self.norm_weight.to(h.dtype), self.norm_bias.to(h.dtype))
        z = _FUNCTIONS[self.activation](F.linear(read, down, b))
        return F.linear(z, up, c).add_(h)  # in place: no gradient needs the product itself

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        return {}

    def misfit(self, layer: nn.Module) -> str | None:
        if why := why_bypassed(layer):
            return why
        d = self.up.shape[0]
        if kind_of(layer) is not None and shape(layer)[0] != d:
            return f"the adapter is for {d} outputs, the layer has {shape(layer)[0]}"
        return None

    def moved(self, layer: nn.Module) -> tuple[float, float]:
        """Measure up·down against the identity, beside which it stands."""
        return delta_norm(self.down, self.up, 1.0) ** 2, float(self.up.shape[0])

    def extra_repr(self) -> str:
        return f"{self.up.shape[0]}→{self.down.shape[0]}, {self.activation}"
