"""What a method is, and what it wants done to a model, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from deltaw.methods.updates.base import Update


@dataclass(frozen=True)
class Plan:
    """What a method wants done to a model, as data: nothing has been changed yet."""

    updates: Mapping[str, Update]
    """Layer name → its update."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Layer name → why this dense weight takes no update."""
    layers: Mapping[str, nn.Module] | None = None
    """All of the model's layers by name, where that each update fits its own has been looked at."""


class Method(Protocol):
    """What a method's config must be able to do. `LoRA` is one."""

    def plan(self, model: nn.Module) -> Plan:
        """The updates for this model. Raises TargetError or ConfigError; changes nothing."""
        ...
