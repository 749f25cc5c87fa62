"""(IA)³ (Liu et al. 2022, arXiv 2205.05638, §3.3): keys, values and the input of a feed-forward's last layer, each times a
trained vector that starts at one. Knows how its settings become updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deltaw.config import check
from deltaw.methods.plan import Plan, register
from deltaw.methods.shared import Beside

if TYPE_CHECKING:
    from torch import nn

    from deltaw.layers.kinds import Runs
    from deltaw.methods.targets import Layer
    from deltaw.methods.updates.base import Update


@register("ia3", lr=2e-2)
@dataclass(frozen=True)
class IA3(Beside):
    """(IA)³, infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv 2205.05638, §3.3).

    Trains a vector l for each layer: [d] for its outputs, l ⊙ (W0x + b), or [k] for its inputs, W0(l ⊙ x) + b.

    Raises:
        ConfigError: A setting is of a wrong type.

    Example:
        >>> import deltaw
        >>> from transformers import AutoModelForCausalLM
        >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.IA3())
        >>> [len(vector) for vector in deltaw.parameters(model)]  # of k and v, then of down, in two blocks
        [16, 16, 16, 16, 56, 56]
    """

    targets: str | Sequence[str] = "k,v"
    """Layers whose outputs are scaled: roles, names, globs or slices of a fused layer, with commas. The paper's l_k and l_v
    (§3.3)."""
    inputs: str | Sequence[str] = "down"
    """Layers whose inputs are scaled, with commas: the last one of a feed-forward. Empty for none. The paper's l_ff (§3.3)."""

    def __post_init__(self) -> None:
        check(self)

    def plan(self, model: nn.Module) -> Plan:
        """Return a vector for each layer, fp32 (float64 on a float64 base). Raises TargetError."""
        from deltaw.errors import TargetError
        from deltaw.methods.targets import select

        updates: dict[str, Update] = {}
        left_out: dict[str, str] = {}
        for targets, inputs in ((self.targets, False), (self.inputs, True)):
            if not targets:
                continue
            selection = select(model, targets, 1, without=self.trained_whole(model))
            left_out = selection.left_out
            for name, layer in selection.layers.items():
                if name in updates:
                    raise TargetError(f"{name!r} is among both targets and inputs: scale one of the two.")
                updates[name] = _update(name, layer, selection.slices.get(name, {}), inputs=inputs)
        return self.planned(model, updates, {n: why for n, why in left_out.items() if n not in updates})

    def of_layers(self, updates: Mapping[str, Update]) -> IA3:
        from deltaw.methods.updates.ia3 import Scaled

        scaled = {name: update.inputs for name, update in updates.items() if isinstance(update, Scaled)}
        outputs, inputs = ([name for name, side in scaled.items() if side is wanted] for wanted in (False, True))
        return replace(self, targets=outputs, inputs=inputs)


def _update(name: str, layer: Layer, slices: Mapping[str, Runs], *, inputs: bool) -> Update:
    """Return a vector of ones for a layer or its slices. Raises TargetError for a layer that has no form of (IA)³."""
    from deltaw.errors import TargetError
    from deltaw.layers.kinds import Weight, kind_of, shape
    from deltaw.methods.updates.ia3 import Scaled, ones
    from deltaw.methods.updates.lowrank import places_of

    kind = None if isinstance(layer, Weight) else kind_of(layer)
    if isinstance(layer, Weight) or kind is None or not kind.multiplies:
        raise TargetError(
            f"(IA)³ has no form for {name!r}, which is no dense layer with inputs of its own: leave it out."
        )
    if slices and inputs:
        raise TargetError(
            f"(IA)³ scales all inputs of {name!r}, or none: slices are of its outputs ({', '.join(slices)})."
        )
    weight = layer._parameters["weight"]
    assert weight is not None
    rows = places_of(slices)[0].to(weight.device) if slices else None
    d, k = shape(layer)
    return Scaled(ones(k if inputs else d if rows is None else len(rows), weight), inputs=inputs, rows=rows)
