"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): the biases of the model are trained, and nothing else. Knows how its settings
become updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deltaw.methods.plan import Instead, Plan, register
from deltaw.methods.shared import Beside

if TYPE_CHECKING:
    from torch import nn

    from deltaw.methods.updates.base import Update


@register("bitfit", lr=4e-3)
@dataclass(frozen=True)
class BitFit(Beside):
    """BitFit (Ben Zaken et al. 2022, arXiv 2106.10199, §3): trains all biases, of dense layers, norms and heads.

    Example:
        >>> import deltaw
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("model")  # of Llama's architecture, which has no biases
        >>> model = deltaw.attach(model, deltaw.BitFit(add=True))
        >>> deltaw.summary(model).adapters["default"].parameters  # of 2 blocks: q 32, k 16, v 16, o 32, gate 56, up 56, down 32
        480
    """

    add: bool = False
    """Give dense layers that have no bias one, zero at the start. Such an adapter cannot be merged: the base has no place
    for it."""

    def plan(self, model: nn.Module) -> Plan:
        """Return a value for each bias, fp32 (float64 on a float64 base). Raises TargetError where the model has none."""
        from deltaw.errors import TargetError
        from deltaw.layers.tree import base_modules
        from deltaw.methods.whole import biases

        beside = self.beside(model, {})
        trained = biases(dict(base_modules(model)), beside)
        added = self._added(model, {**beside, **trained}) if self.add else {}
        if not trained and not added:
            raise TargetError(
                f"BitFit trains biases, and this {type(model).__name__} has none (Llama and its like have none). Give its dense "
                "layers biases with BitFit(add=True) (command line: --add), or take another method."
            )
        return Plan({**beside, **trained, **added})

    def instead(self) -> Instead | None:
        """Return BitFit that adds biases, for models that have none."""
        note = "The model has no biases: its dense layers get some."
        return None if self.add else Instead(replace(self, add=True), note)

    def _added(self, model: nn.Module, taken: Mapping[str, Update]) -> dict[str, Update]:
        """Return a bias for each dense layer that has none, but for the layers in `taken`."""
        import torch

        from deltaw.layers.kinds import Weight, shape
        from deltaw.methods.targets import select
        from deltaw.methods.updates.bitfit import AddedBias

        added: dict[str, Update] = {}
        for name, layer in select(model, "all-linear", 1).layers.items():
            if isinstance(layer, Weight) or layer._parameters.get("bias") is not None or name in taken:
                continue
            weight = layer._parameters["weight"]
            assert weight is not None
            dtype = torch.promote_types(weight.dtype, torch.float32)
            added[name] = AddedBias(torch.zeros(shape(layer)[0], device=weight.device, dtype=dtype))
        return added
