"""A trained bias for a layer that has none (BitFit: Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltaw.layers.kinds import shape, why_not
from deltaw.layers.ops.merging import Change, Value
from deltaw.layers.unwrap import itself, own_forward
from deltaw.methods.updates.base import Update, square


class AddedBias(Update):
    """A bias [d] for a dense layer that has none: what BitFit trains where the base lacks biases."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def branch(self, layer: Any, *inputs: Any, **named: Any) -> Tensor:
        out = own_forward(layer)(itself(layer), *inputs, **named)
        return out + self.bias.to(out.dtype)

    def values(self) -> dict[str, nn.Parameter]:
        return {"bias": self.bias}

    def changes(self, layer: Any) -> dict[str, Change]:
        return {"bias": Value(self.bias.detach().reshape(1, -1))}

    def parameter(self, layer: Any, own_name: str) -> Tensor | None:
        if own_name != "bias":
            return super().parameter(layer, own_name)
        return self.bias.to(layer._parameters["weight"].dtype)

    def misfit(self, layer: Any) -> str | None:
        if why := why_not(layer):
            return why
        d = shape(layer)[0]
        return None if len(self.bias) == d else f"the bias is [{len(self.bias)}], the layer has {d} outputs"

    def moved(self, layer: Any) -> tuple[float, float]:
        return square(self.bias), square(layer._parameters["weight"])
