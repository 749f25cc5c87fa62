"""Full fine-tuning as an adapter: every parameter of the model gets a trained value in its place. Knows how this becomes
updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from deltaw.attached import Plan


@dataclass(frozen=True)
class Full:
    """Trains all parameters. The base's own stay beside them, so that it is there for `use(model, None)` and `detach`: that
    takes the base's memory once more than full fine-tuning by itself. Its file is as large as the model."""

    def plan(self, model: nn.Module) -> Plan:
        """A value for each parameter, fp32 (float64 on a float64 base); ties stay."""
        from deltaw.attached import Plan, base_modules
        from deltaw.wholes import everything

        return Plan(everything(dict(base_modules(model))))
