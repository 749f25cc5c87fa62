"""Updates of dense weights that are no layer: parameters of a module whose forward uses them, such as the projections of
`nn.MultiheadAttention` or a mixture's stack of experts. Knows one module, never a model.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor, nn

from deltaw.layers.kinds import PARAMETER, matrices_of, why_bypassed
from deltaw.layers.ops.experts import Unformed
from deltaw.layers.ops.merging import Change, Product, Stacked
from deltaw.layers.unwrap import plain_class, shell
from deltaw.methods.updates.base import Update, own_tensor, square
from deltaw.methods.updates.lowrank import LowRank


class OnWeights(Update):
    """Updates of weights of a module, by its names of these parameters: `LowRank` or `Sliced` of a matrix, `Stack` of several.

    The module's forward gets W0 + ΔW in their places. Of a matrix it is formed in each pass, and its gradient has W0's shape. Of
    a stack its products with tokens are computed by the branch (layers/ops/experts.py).
    """

    of_weights = True

    def __init__(self, parts: Mapping[str, LowRank]) -> None:
        super().__init__()
        self._modules.update(parts)

    @property
    def parts(self) -> dict[str, LowRank]:
        """The module's names of its weights → their updates."""
        return dict(self._modules)  # type: ignore[arg-type]

    def put(self, own_name: str, part: LowRank) -> None:
        """Add or replace the update of one of the module's weights."""
        self._modules[own_name] = part

    def low_rank(self) -> dict[str, LowRank]:
        return self.parts

    def branch(self, layer: nn.Module, *inputs: object, **named: object) -> object:
        values = {own_name: part.stand_in(own_tensor(layer, own_name)) for own_name, part in self.parts.items()}
        return plain_class(layer).forward(shell(layer, values), *inputs, **named)

    def parameter(self, layer: nn.Module, own_name: str) -> Tensor | None:
        if own_name not in self._modules:
            return super().parameter(layer, own_name)
        return self.parts[own_name].weight(own_tensor(layer, own_name))

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        return {own_name: part.changes(layer)["weight"] for own_name, part in self.parts.items()}

    def misfit(self, layer: nn.Module) -> str | None:
        if why := why_bypassed(layer):
            return why
        known = matrices_of(layer)
        for own_name, part in self.parts.items():
            if own_name not in known:
                return f"a {plain_class(layer).__name__} has no dense weight {own_name!r}"
            if why := part.other_weight(own_tensor(layer, own_name).shape):
                return f"{own_name}: {why}"
        return None

    def moved(self, layer: nn.Module) -> tuple[float, float]:
        pairs = [(part, own_tensor(layer, own_name)) for own_name, part in self.parts.items()]
        return sum(part.squared() for part, _ in pairs), sum(square(W0) for _, W0 in pairs)


def put_on_weight(updates: MutableMapping[str, Update], module_name: str, own_name: str, part: LowRank) -> bool:
    """Put the update of a module's weight among `updates` (module name → update).

    Returns False, and changes nothing, where the weight, or the module as a layer, has an update there already.
    """
    of_module = updates.setdefault(module_name, OnWeights({}))
    if not isinstance(of_module, OnWeights) or own_name in of_module.parts:
        return False
    of_module.put(own_name, part)
    return True


class Stack(LowRank):
    """An update of each matrix in a stack of them [E, d, k]: A [E, r, k], B [E, d, r], ΔW_e = scale·B_e A_e.

    With `transposed` the matrices are stored [k, d].
    """

    transposed: bool

    def __init__(self, A: Tensor, B: Tensor, scale: float, *, transposed: bool = False) -> None:
        super().__init__(PARAMETER, A, B, scale)
        vars(self).update(transposed=transposed)

    @property
    def rank(self) -> int:
        """r of each matrix."""
        return self.A.shape[1]

    @property
    def fits(self) -> tuple[int, int]:
        return self.B.shape[1], self.A.shape[2]

    def remade(self, A: Tensor, B: Tensor, bias: Tensor | None = None) -> LowRank:
        assert bias is None
        return Stack(A, B, 1.0, transposed=self.transposed)

    def weight(self, W0: Tensor) -> Tensor:
        """Return W0 + ΔW in W0's shape and dtype; gradients flow to A and B."""
        return self.unformed(W0).formed()

    def stand_in(self, W0: Tensor) -> Tensor:
        """Return W0 + ΔW for the module's forward: formed only while a graph is recorded, which knows plain tensors alone."""
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        return self.weight(W0) if recorded else self.unformed(W0)

    def unformed(self, W0: Tensor) -> Unformed:
        """Return W0 + ΔW as a tensor of W0's shape that keeps the two apart until a product asks for them."""
        A, B = self.A.to(W0.dtype), self.B.to(W0.dtype)
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        return Unformed(W0, left, right, self.scale, fast=self.training)

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        pairs = zip(self.A, self.B, strict=True)
        factors = [(B.t(), A.t()) if self.transposed else (A, B) for A, B in pairs]
        return {"weight": Stacked([Product(A, B, self.scale) for A, B in factors])}

    def other_weight(self, shape: tuple[int, ...]) -> str | None:
        (d, k), E = self.fits, self.A.shape[0]
        stored = (E, k, d) if self.transposed else (E, d, k)
        return None if stored == tuple(shape) else f"the update is {list(stored)}, the weight {list(shape)}"
