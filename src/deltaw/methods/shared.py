"""Settings that nearly all methods share: modules trained whole, norms, tokens. Knows how these settings become updates."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaw.methods.plan import Method, Plan

if TYPE_CHECKING:
    from torch import nn

    from deltaw.methods.updates.base import Update


@dataclass(frozen=True, kw_only=True)
class Beside(Method, ABC):
    """Settings of what is trained beside a method's updates."""

    whole: str | Sequence[str] = ""
    """Modules to train whole beside the update, by names or globs with commas: lm_head, embed_tokens, score. A weight
    that the model ties stays tied."""
    norms: bool = False
    """Train the weights and biases of all normalisation layers too."""
    tokens: str | Sequence[int] = ""
    """Tokens, by ids with commas, whose rows of the embedding (and of a head tied to it) are trained. The file then holds these
    rows alone."""

    def trained_whole(self, model: nn.Module) -> set[str]:
        """Return the names of the modules that `whole` means, and of all modules inside them."""
        from deltaw.layers.tree import base_modules
        from deltaw.methods.whole import inside

        return inside(dict(base_modules(model)), self.whole)

    def beside(self, model: nn.Module, updates: Mapping[str, Update]) -> dict[str, Update]:
        """Return the updates that these settings mean (layer name → update), on other modules than those of `updates`.

        Raises TargetError with all that does not fit the model.
        """
        from deltaw.layers.tree import base_modules
        from deltaw.methods.whole import with_wholes

        return with_wholes(dict(base_modules(model)), self.whole, self.tokens, updates, norms=self.norms)

    def planned(self, model: nn.Module, updates: Mapping[str, Update], left_out: Mapping[str, str] = {}) -> Plan:
        """Return the plan of a method's `updates` and of those that these settings mean. Raises TargetError as `beside`."""
        more = self.beside(model, updates)
        return Plan({**updates, **more}, {n: why for n, why in left_out.items() if n not in more})
