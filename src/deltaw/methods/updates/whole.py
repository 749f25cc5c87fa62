"""Trained values in place of the base's: of whole parameters of a module, or of some tokens' rows of an embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.layers.kinds import as_matrix, why_bypassed
from deltaw.layers.ops.merging import Change, Value, wide
from deltaw.layers.patch import only_input
from deltaw.layers.unwrap import itself, own_forward, shell
from deltaw.methods.updates.base import Sums, Update, own_tensor, square


class Replaced(Update):
    """Other values in place of a module's parameters: a head or an embedding that is trained whole, a trained bias.

    An embedding or an output layer may have another number of tokens than the base's.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for own_name, value in values.items():
            self._parameters[own_name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)

    def branch(self, layer: nn.Module, *inputs: object, **named: object) -> object:
        values = {}
        for own_name, value in self._parameters.items():
            replaced = layer._parameters[own_name]
            assert value is not None and replaced is not None
            values[own_name] = value.to(replaced.dtype)
        return own_forward(layer)(shell(layer, values), *inputs, **named)

    def values(self) -> dict[str, nn.Parameter]:
        return {n: value for n, value in self._parameters.items() if value is not None}

    def replaced(self) -> dict[str, nn.Parameter]:
        return self.values()

    def parameter(self, layer: nn.Module, own_name: str) -> Tensor | None:
        replaced, value = layer._parameters[own_name], self._parameters.get(own_name)
        return replaced if value is None or replaced is None else value.to(replaced.dtype)

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        return {n: Value(as_matrix(layer, n, value.detach())) for n, value in self.values().items()}

    def misfit(self, layer: nn.Module) -> str | None:
        if why := why_bypassed(layer):
            return why
        for own_name, value in self._parameters.items():
            replaced = layer._parameters.get(own_name)
            if replaced is None or value is None:
                return f"it has no parameter {own_name!r}"
            first = 1 if isinstance(layer, (nn.Embedding, nn.Linear)) else 0  # a vocabulary of another size
            if replaced.ndim != value.ndim or replaced.shape[first:] != value.shape[first:]:
                return f"its {own_name} is {list(replaced.shape)}, the adapter's {list(value.shape)}"
        return None

    def moved(self, layer: nn.Module) -> tuple[float, float]:
        """Leave out parameters of another shape than the base's (a vocabulary that was resized)."""
        pairs = [(value, own_tensor(layer, n)) for n, value in self.values().items()]
        alike = [(value, before) for value, before in pairs if value.shape == before.shape]
        return sum(square(value - before) for value, before in alike), sum(square(before) for _, before in alike)


class ReplacedRows(Update):
    """Other rows for some tokens of an embedding, or of an output layer: `rows` [n, d] for the tokens `indices` [n], ascending.

    Tokens from the end of the vocabulary on are added to it.
    """

    own_sum = True
    indices: Tensor

    def __init__(self, indices: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.rows = rows if isinstance(rows, nn.Parameter) else nn.Parameter(rows)

    def branch(self, layer: nn.Module, *inputs: Tensor, **named: Tensor) -> Tensor:
        x = only_input(layer, inputs, named)
        return self._embedded(layer, x) if isinstance(layer, nn.Embedding) else self._logits(layer, x)

    def _embedded(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """Token ids [...] → [..., d]."""
        forward = own_forward(layer)
        out = forward(itself(layer), ids.clamp(max=own_tensor(layer, "weight").shape[0] - 1))
        place = torch.searchsorted(self.indices, ids).clamp_(max=len(self.indices) - 1)
        of_rows = shell(layer, {"weight": self.rows.to(out.dtype)})
        vars(of_rows)["padding_idx"] = None
        return torch.where((self.indices[place] == ids)[..., None], forward(of_rows, place), out)

    def _logits(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x [..., k] → a logit for each token [..., V]."""
        out = own_forward(layer)(itself(layer), x)
        known = self.indices < out.shape[-1]
        logits = F.linear(x, self.rows.to(x.dtype))
        bias = layer._parameters.get("bias")
        if bias is not None:
            logits = logits + F.pad(bias, (0, len(known)))[self.indices]
        out = out.index_copy(-1, self.indices[known], logits[..., known])
        return torch.cat([out, logits[..., ~known]], dim=-1)

    def replaced(self) -> dict[str, nn.Parameter]:
        return {"weight": self.rows}

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        return {"weight": Value(as_matrix(layer, "weight", self._weight(layer).detach()))}

    def parameter(self, layer: nn.Module, own_name: str) -> Tensor | None:
        return self._weight(layer) if own_name == "weight" else super().parameter(layer, own_name)

    def _weight(self, layer: nn.Module) -> Tensor:
        W = own_tensor(layer, "weight")
        return with_room(W, self.indices).index_copy(0, self.indices, self.rows.to(W))

    def summed(self, layer: nn.Module, terms: Sequence[tuple[Update, float]], sums: Sums) -> ReplacedRows:
        """Return rows for the tokens of all terms: the base's, and weight·(row − base's) of each that has the token."""
        replacing = [(update, weight) for update, weight in terms if isinstance(update, ReplacedRows)]
        indices: Tensor = torch.unique(torch.cat([u.indices for u, _ in replacing]))
        key = tuple((id(update.rows), weight) for update, weight in replacing)
        if key not in sums:
            W0 = own_tensor(layer, "weight").detach()
            base = with_room(W0.to(wide(W0.dtype)), indices)[indices]
            rows = base.clone()
            for update, weight in replacing:
                place = torch.searchsorted(indices, update.indices)
                rows[place] += weight * (update.rows.detach().to(base.dtype) - base[place])
            sums[key] = nn.Parameter(rows)
        return ReplacedRows(indices, sums[key])

    def misfit(self, layer: nn.Module) -> str | None:
        if why := why_bypassed(layer):
            return why
        if not isinstance(layer, (nn.Embedding, nn.Linear)):
            return f"a {type(layer).__name__} has no rows of tokens"
        W = own_tensor(layer, "weight")
        if self.rows.ndim != 2 or self.rows.shape != (len(self.indices), W.shape[1]):
            return f"its rows have {W.shape[1]} entries, the adapter's are {list(self.rows.shape)}"
        more = added(W, self.indices)
        if int((self.indices >= W.shape[0]).sum()) != more:
            return f"the adapter adds tokens up to {int(self.indices[-1])}, but not all from {W.shape[0]} on"
        return None

    def moved(self, layer: nn.Module) -> tuple[float, float]:
        """Leave out tokens that the base has no rows for."""
        W = own_tensor(layer, "weight")
        known = self.indices < W.shape[0]
        before = W[self.indices[known]]
        return square(self.rows[known] - before), square(before)


def added(weight: Tensor, indices: Tensor) -> int:
    """Return how many rows a weight [V, d] lacks for the last of these tokens, which are in ascending order."""
    return max(0, int(indices[-1]) + 1 - weight.shape[0])


def with_room(weight: Tensor, indices: Tensor) -> Tensor:
    """Return a copy of a weight [V, d] that has rows for all of these tokens, zero where it had none."""
    return torch.cat([weight, weight.new_zeros(added(weight, indices), weight.shape[1])])
