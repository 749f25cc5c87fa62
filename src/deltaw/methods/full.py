"""Full fine-tuning as an adapter: every parameter of the model gets a trained value in its place. Knows how this becomes
updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from deltaw.methods.plan import Method, Plan, register

if TYPE_CHECKING:
    from torch import nn


@register("full", lr=1e-4)
@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: a trained value in place of every floating-point parameter.

    The base's parameters stay beside them, so that the base can be used and given back. That takes the base's memory once more
    than full fine-tuning by itself; the file is as large as the model.

    Example:
        >>> import deltaw
        >>> from transformers import AutoModelForCausalLM
        >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.Full())
        >>> summary = deltaw.summary(model)
        >>> summary.adapters["default"].parameters == summary.base_parameters
        True
    """

    trains_everything: ClassVar[bool] = True

    kept: Literal["weights", "difference"] = "weights"
    """Content of the file: the trained weights, or their difference from the base's. Weights need no base to be read. ΔW = W − W0
    belongs to this base alone; beside it stand the entries that W0 + ΔW would not give back bit for bit."""
    whole: str | Sequence[str] = ""
    """Modules that are kept as weights even so, by names or globs with commas. `train` adds a head that the checkpoint lacks,
    which is random each time that the model is opened."""

    def plan(self, model: nn.Module) -> Plan:
        """Return a value for each parameter, fp32 (float64 on a float64 base); tied ones stay tied.

        Raises TargetError for names in `whole` that match no module.
        """
        from deltaw.layers.tree import base_modules
        from deltaw.methods.whole import everything, with_wholes

        modules = dict(base_modules(model))
        with_wholes(modules, self.whole, "", {})
        return Plan(everything(modules))
