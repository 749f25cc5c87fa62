"""Updates of dense weights that have no layer of their own: they are parameters of a module whose forward uses them, the
projections of `nn.MultiheadAttention` or a mixture's stack of experts. Knows one module, never a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltaw.layers.kinds import PARAMETER, matrices_of, why_bypassed
from deltaw.layers.ops.experts import Unformed
from deltaw.layers.ops.merging import Change, Product, Stacked
from deltaw.layers.unwrap import plain_class, shell
from deltaw.methods.updates.base import Update, square
from deltaw.methods.updates.lowrank import LowRank


class OnWeights(Update):
    """Updates of weights that are only parameters of their module, whose forward uses them: by the parameter's own name, a
    `LowRank` or `Sliced` of a matrix, or a `Stack` of several. In their places the forward gets W0 + ΔW: of a matrix it is
    formed in each pass, and its gradient has W0's shape; of a stack its products with tokens are computed by the branch
    (layers/ops/experts.py)."""

    def __init__(self, parts: Mapping[str, LowRank]) -> None:
        super().__init__()
        self._modules.update(parts)

    @property
    def parts(self) -> dict[str, LowRank]:
        return dict(self._modules)  # type: ignore[arg-type]

    def low_rank(self) -> dict[str, LowRank]:
        return self.parts

    def branch(self, layer: Any, *inputs: Any, **named: Any) -> Any:
        values = {own: part.stand_in(layer._parameters[own]) for own, part in self.parts.items()}
        return plain_class(layer).forward(shell(layer, values), *inputs, **named)

    def parameter(self, layer: Any, own_name: str) -> Tensor | None:
        if own_name not in self._modules:
            return super().parameter(layer, own_name)
        return self.parts[own_name].weight(layer._parameters[own_name])

    def changes(self, layer: Any) -> dict[str, Change]:
        return {own: part.changes(layer)["weight"] for own, part in self.parts.items()}

    def misfit(self, layer: Any) -> str | None:
        if why := why_bypassed(layer):
            return why
        known = matrices_of(layer)
        for own, part in self.parts.items():
            if own not in known:
                return f"a {plain_class(layer).__name__} has no dense weight {own!r}"
            if why := part.other_weight(layer._parameters[own].shape):
                return f"{own}: {why}"
        return None

    def moved(self, layer: Any) -> tuple[float, float]:
        pairs = [(part, layer._parameters[own]) for own, part in self.parts.items()]
        return sum(part.squared() for part, _ in pairs), sum(square(W0) for _, W0 in pairs)


class Stack(LowRank):
    """An update of each of the matrices in a stack of them [E, d, k]: A [E, r, k], B [E, d, r], ΔW_e = scale·B_e A_e. With
    `transposed` the matrices are stored [k, d]."""

    transposed: bool

    def __init__(self, A: Tensor, B: Tensor, scale: float, *, transposed: bool = False) -> None:
        super().__init__(PARAMETER, A, B, scale)
        vars(self).update(transposed=transposed)

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    def remade(self, A: Tensor, B: Tensor, bias: Tensor | None = None) -> LowRank:
        assert bias is None
        return Stack(A, B, 1.0, transposed=self.transposed)

    def weight(self, W0: Tensor) -> Tensor:
        """W0 + ΔW in W0's shape and dtype; gradients flow to A and B."""
        return self.unformed(W0).formed()

    def stand_in(self, W0: Tensor) -> Tensor:
        """W0 + ΔW for the module's forward: formed only where a graph is recorded, which knows plain tensors alone."""
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return self.weight(W0) if recorded else self.unformed(W0)

    def unformed(self, W0: Tensor) -> Unformed:
        A, B = self.A.to(W0.dtype), self.B.to(W0.dtype)
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        return Unformed(W0, left, right, self.scale, fast=self.training)

    def changes(self, layer: Any) -> dict[str, Change]:
        pairs = zip(self.A, self.B, strict=True)
        factors = [(B.t(), A.t()) if self.transposed else (A, B) for A, B in pairs]
        return {"weight": Stacked([Product(A, B, self.scale) for A, B in factors])}

    def other_weight(self, shape: tuple[int, ...]) -> str | None:
        d, k = self.B.shape[1], self.A.shape[2]
        own = (self.A.shape[0], k, d) if self.transposed else (self.A.shape[0], d, k)
        return None if own == tuple(shape) else f"the update is {list(own)}, the weight {list(shape)}"
