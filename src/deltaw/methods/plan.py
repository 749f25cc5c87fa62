"""Methods as such: settings with a name, and the plan that they make for a model. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from deltaw.methods.updates.base import Update


@dataclass(frozen=True)
class Plan:
    """The changes that a method wants of a model, as data: nothing has been changed yet."""

    updates: Mapping[str, Update]
    """Layer name → its update."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Layer name → why this dense weight takes no update."""
    layers: Mapping[str, nn.Module] | None = None
    """The model's layers by name, given by a caller that has checked that each update fits its layer. None: not checked yet."""


class Instead(NamedTuple):
    """Other settings, and a sentence on what they do otherwise."""

    method: Method
    note: str


@dataclass(frozen=True)
class Method(ABC):
    """The settings of a method of adaptation. A method is a frozen dataclass that inherits from this, such as `LoRA`."""

    trains_everything: ClassVar[bool] = False
    """Its adapter is a model of its own, as large as the base."""

    @abstractmethod
    def plan(self, model: nn.Module) -> Plan:
        """Return the updates for this model, which is only read.

        Raises TargetError where these settings do not fit the model, ConfigError where they fit none.
        """

    @property
    def positions(self) -> int:
        """The number of a model's positions that it takes from each row, which tokens then cannot have."""
        return 0

    def instead(self) -> Instead | None:
        """Return settings that fit more models, for a comparison to take where these do not fit; None where there are none."""
        return None

    def of_layers(self, updates: Mapping[str, Update]) -> Method | None:
        """Return these settings for exactly the layers of `updates` (layer name → update), which `combine` has made.

        None where `combine` is to call the result LoRA.
        """
        return None


@dataclass(frozen=True)
class Preset:
    """Settings of a method that have a name of their own in comparisons."""

    lr: float
    """Usual learning rate."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Field → value, of those that are not the method's defaults."""


METHODS: dict[str, type[Method]] = {}
"""Name → method, as the command line, files and comparisons have it. `methods/registry.py` fills it."""
PRESETS: dict[str, tuple[str, Preset]] = {}
"""Name in a comparison → the method's name and settings; each method is there under its name too."""

M = TypeVar("M", bound=Method)


def register(name: str, *, lr: float, presets: Mapping[str, Preset] | None = None) -> Callable[[type[M]], type[M]]:
    """Return a class decorator that makes a method known by name: to the command line, YAML, files and comparisons.

    Args:
        name: One word, for `--method`, `config.yaml` and the adapter's file.
        lr: Usual peak learning rate of the default settings, from which a comparison starts.
        presets: Name in comparisons → other settings of the method, with their usual rate.

    Raises ValueError for a name that another class has.
    """
    named = {name: Preset(lr), **(presets or {})}

    def add(cls: type[M]) -> type[M]:
        # A module that is executed again (importlib.reload) registers its class again
        if any(other in PRESETS and METHODS[PRESETS[other][0]].__qualname__ != cls.__qualname__ for other in named):
            raise ValueError(f"{', '.join(named)}: one of these names is another method's already.")
        METHODS[name] = cls
        PRESETS.update({preset: (name, of_preset) for preset, of_preset in named.items()})
        return cls

    return add
