"""A trained bias for a layer that has none (BitFit: Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from torch import Tensor, nn

from deltaw.layers.kinds import shape, why_not
from deltaw.layers.ops.merging import Change, Value
from deltaw.layers.unwrap import itself, own_forward
from deltaw.methods.updates.base import Update, own_tensor, square


class AddedBias(Update):
    """A bias [d] for a dense layer that has none: what BitFit trains where the base lacks biases."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def branch(self, layer: nn.Module, *inputs: object, **named: object) -> Tensor:
        out: Tensor = own_forward(layer)(itself(layer), *inputs, **named)
        return out + self.bias.to(out.dtype)

    def values(self) -> dict[str, nn.Parameter]:
        return {"bias": self.bias}

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        return {"bias": Value(self.bias.detach().reshape(1, -1))}

    def parameter(self, layer: nn.Module, own_name: str) -> Tensor | None:
        if own_name != "bias":
            return super().parameter(layer, own_name)
        return self.bias.to(own_tensor(layer, "weight").dtype)

    def misfit(self, layer: nn.Module) -> str | None:
        if why := why_not(layer):
            return why
        d = shape(layer)[0]
        return None if len(self.bias) == d else f"the bias is [{len(self.bias)}], the layer has {d} outputs"

    def moved(self, layer: nn.Module) -> tuple[float, float]:
        return square(self.bias), square(own_tensor(layer, "weight"))
