"""Full fine-tuning as an adapter: every parameter of the model gets a trained value in its place. Knows how this becomes
updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

    from deltaw.methods.plan import Plan


@dataclass(frozen=True)
class Full:
    """Trains all parameters. The base's own stay beside them, so that it is there for `use(model, None)` and `detach`: that
    takes the base's memory once more than full fine-tuning by itself. Its file is as large as the model."""

    kept: Literal["weights", "difference"] = "weights"
    """What the file holds: the trained weights, which need no base to be read, or ΔW = W − W0 of each, which belongs to this base
    alone (with the entries beside it that W0 + ΔW would not give back bit for bit)."""
    whole: str | Sequence[str] = ""
    """Modules that are kept as weights even so, by names or globs: a head that the checkpoint does not have, which is another one
    each time it is made. `train` adds that one."""

    def plan(self, model: nn.Module) -> Plan:
        """A value for each parameter, fp32 (float64 on a float64 base); ties stay. Raises TargetError for modules that there
        are not."""
        from deltaw.layers.tree import base_modules
        from deltaw.methods.plan import Plan
        from deltaw.methods.whole import everything, with_wholes

        modules = dict(base_modules(model))
        with_wholes(modules, self.whole, "", {})
        return Plan(everything(modules))
