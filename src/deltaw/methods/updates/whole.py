"""Trained values in place of a layer's own: of whole parameters, or of rows of an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.layers.kinds import as_matrix, why_bypassed
from deltaw.layers.ops.merging import Change, Value
from deltaw.layers.patch import only_input
from deltaw.layers.unwrap import itself, own_forward, shell
from deltaw.methods.updates.base import Update, square
from deltaw.methods.updates.lowrank import added, with_room


class Replaced(Update):
    """Other values in place of a module's own parameters: a head or an embedding that is trained whole, a trained bias. An
    embedding or an output layer may have another number of tokens than the base's."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for own_name, value in values.items():
            self._parameters[own_name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)

    def branch(self, layer: Any, *inputs: Any, **named: Any) -> Any:
        values = {}
        for own_name, value in self._parameters.items():
            assert value is not None
            values[own_name] = value.to(layer._parameters[own_name].dtype)
        return own_forward(layer)(shell(layer, values), *inputs, **named)

    def values(self) -> dict[str, nn.Parameter]:
        return {n: value for n, value in self._parameters.items() if value is not None}

    def parameter(self, layer: Any, own_name: str) -> Tensor | None:
        own, value = layer._parameters[own_name], self._parameters.get(own_name)
        return own if value is None else value.to(own.dtype)

    def changes(self, layer: Any) -> dict[str, Change]:
        return {n: Value(as_matrix(layer, n, v.detach())) for n, v in self._parameters.items() if v is not None}

    def misfit(self, layer: Any) -> str | None:
        if why := why_bypassed(layer):
            return why
        for own_name, value in self._parameters.items():
            own = layer._parameters.get(own_name)
            if own is None or value is None:
                return f"it has no parameter {own_name!r}"
            first = 1 if isinstance(layer, (nn.Embedding, nn.Linear)) else 0  # a vocabulary of another size
            if own.ndim != value.ndim or own.shape[first:] != value.shape[first:]:
                return f"its {own_name} is {list(own.shape)}, the adapter's {list(value.shape)}"
        return None

    def moved(self, layer: Any) -> tuple[float, float]:
        pairs = [(value, layer._parameters[n]) for n, value in self._parameters.items() if value is not None]
        alike = [(value, own) for value, own in pairs if value.shape == own.shape]
        return sum(square(value - own) for value, own in alike), sum(square(own) for _, own in alike)


class ReplacedRows(Update):
    """Other rows for some tokens of an embedding, or of an output layer: `rows` [n, d] for the tokens `indices` [n], in order.
    Tokens from the end of the vocabulary on are added to it."""

    indices: Tensor

    def __init__(self, indices: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.rows = rows if isinstance(rows, nn.Parameter) else nn.Parameter(rows)

    def branch(self, layer: Any, *inputs: Any, **named: Any) -> Tensor:
        x = only_input(layer, inputs, named)
        return self._embedded(layer, x) if isinstance(layer, nn.Embedding) else self._logits(layer, x)

    def _embedded(self, layer: Any, ids: Tensor) -> Tensor:
        forward = own_forward(layer)
        out = forward(itself(layer), ids.clamp(max=layer._parameters["weight"].shape[0] - 1))
        place = torch.searchsorted(self.indices, ids).clamp_(max=len(self.indices) - 1)
        own = shell(layer, {"weight": self.rows.to(out.dtype)})
        own.padding_idx = None
        return torch.where((self.indices[place] == ids)[..., None], forward(own, place), out)

    def _logits(self, layer: Any, x: Tensor) -> Tensor:
        out = own_forward(layer)(itself(layer), x)
        known = self.indices < out.shape[-1]
        own = F.linear(x, self.rows.to(x.dtype))
        bias = layer._parameters.get("bias")
        if bias is not None:
            own = own + F.pad(bias, (0, len(known)))[self.indices]
        out = out.index_copy(-1, self.indices[known], own[..., known])
        return torch.cat([out, own[..., ~known]], dim=-1)

    def changes(self, layer: Any) -> dict[str, Change]:
        return {"weight": Value(as_matrix(layer, "weight", self._weight(layer).detach()))}

    def parameter(self, layer: Any, own_name: str) -> Tensor | None:
        return self._weight(layer) if own_name == "weight" else super().parameter(layer, own_name)

    def _weight(self, layer: Any) -> Tensor:
        W = layer._parameters["weight"]
        return with_room(W, self.indices).index_copy(0, self.indices, self.rows.to(W))

    def misfit(self, layer: Any) -> str | None:
        if why := why_bypassed(layer):
            return why
        if not isinstance(layer, (nn.Embedding, nn.Linear)):
            return f"a {type(layer).__name__} has no rows of tokens"
        W: Any = layer._parameters["weight"]
        if self.rows.ndim != 2 or self.rows.shape != (len(self.indices), W.shape[1]):
            return f"its rows have {W.shape[1]} entries, the adapter's are {list(self.rows.shape)}"
        more = added(W, self.indices)
        if int((self.indices >= W.shape[0]).sum()) != more:
            return f"the adapter adds tokens up to {int(self.indices[-1])}, but not all from {W.shape[0]} on"
        return None

    def moved(self, layer: Any) -> tuple[float, float]:
        W = layer._parameters["weight"]
        known = self.indices < W.shape[0]
        own = W[self.indices[known]]
        return square(self.rows[known] - own), square(own)
