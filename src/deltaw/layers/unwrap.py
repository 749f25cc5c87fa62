"""An adapted layer as it was before: its class, its forward, its parameters. layers/patch.py says how it became another class.

Kinds and updates compute with a layer while it is adapted, and must call what it was. Knows one layer, and nothing of updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

_Layer = TypeVar("_Layer", bound=nn.Module)


class Before(NamedTuple):
    """The class and forward that instances of a dynamic class had before they were adapted."""

    plain: type[nn.Module]
    """Their class."""
    inner: type[nn.Module] | None
    """The class whose forward the dynamic one stands in for, where that is not `plain`'s but one that it calls."""
    read: bool
    """Their parameters read with the active update (layers/patch.py)."""


_before: dict[type[nn.Module], Before] = {}


def remember(adapted: type[nn.Module], before: Before) -> None:
    """Note what a dynamic class was made of."""
    _before[adapted] = before


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that the layer had before it was adapted."""
    before = _before.get(type(layer))
    return type(layer) if before is None else before.plain


def own_forward(layer: nn.Module) -> Callable[..., Any]:
    """Return the forward in whose place the layer's updates are: its plain class's, or the one that this calls."""
    before = _before.get(type(layer))
    if before is None:
        return type(layer).forward
    return before.plain.forward if before.inner is None else before.inner.forward


def itself(layer: _Layer) -> _Layer:
    """Return what the layer's own forward is to be called with: it has the layer's own parameters, whatever they read as."""
    before = _before.get(type(layer))
    return shell(layer, {}) if before is not None and before.read else layer


def shell(layer: _Layer, values: Mapping[str, Tensor | None]) -> _Layer:
    """Return an object with the layer's class and attributes, but for these parameters: others may be using the layer itself."""
    shell = object.__new__(plain_class(layer))
    shell.__dict__ = {**vars(layer), "_parameters": {**layer._parameters, **values}}
    return shell  # type: ignore[return-value]
