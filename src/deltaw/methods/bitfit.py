"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): the biases of the model are trained, and nothing else. Knows how its settings
become updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaw.methods.shared import Beside

if TYPE_CHECKING:
    from torch import nn

    from deltaw.methods.plan import Plan
    from deltaw.methods.updates.base import Update


@dataclass(frozen=True)
class BitFit(Beside):
    """Trains all biases: of dense layers, norms and heads."""

    add: bool = False
    """Give the dense layers that have no bias one, zero at the start. Such an adapter cannot be merged: the base has no place
    for it."""

    def plan(self, model: nn.Module) -> Plan:
        """Each bias in fp32 (float64 on a float64 base). Raises TargetError where the model has none."""
        from deltaw.errors import TargetError
        from deltaw.layers.tree import base_modules
        from deltaw.methods.plan import Plan
        from deltaw.methods.whole import biases

        updates = self.beside(model, {})
        own = biases(dict(base_modules(model)), updates)
        added = self._added(model, {**updates, **own}) if self.add else {}
        if not own and not added:
            raise TargetError(
                f"BitFit trains biases, and this {type(model).__name__} has none (Llama and its like have none). Give its dense "
                "layers biases with BitFit(add=True) (command line: --add), or take another method."
            )
        return Plan({**updates, **own, **added})

    def _added(self, model: nn.Module, taken: Mapping[str, Update]) -> dict[str, Update]:
        import torch

        from deltaw.layers.kinds import Weight, shape
        from deltaw.methods.targets import select
        from deltaw.methods.updates.bitfit import AddedBias

        made: dict[str, Update] = {}
        for name, layer in select(model, "all-linear", 1).layers.items():
            if isinstance(layer, Weight) or layer._parameters.get("bias") is not None or name in taken:
                continue
            weight = layer._parameters["weight"]
            assert weight is not None
            dtype = torch.promote_types(weight.dtype, torch.float32)
            made[name] = AddedBias(torch.zeros(shape(layer)[0], device=weight.device, dtype=dtype))
        return made
