"""What an adapted layer was before: its class, its own forward. Knows one layer, and nothing of updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_plain: dict[type[nn.Module], type[nn.Module]] = {}
_inner: dict[type[nn.Module], type[nn.Module]] = {}
_read: set[type[nn.Module]] = set()


def remember(
    adapted: type[nn.Module], plain: type[nn.Module], inner: type[nn.Module] | None, *, read: bool = False
) -> None:
    """`adapted` was made of `plain`, and stands in for the forward of `inner` where it comes between the two. `read`: its
    parameters read as others, with the active update."""
    _plain[adapted] = plain
    if inner is not None:
        _inner[adapted] = inner
    if read:
        _read.add(adapted)


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the layer had before it was adapted."""
    return _plain.get(type(layer), type(layer))


def own_forward(layer: nn.Module) -> Any:
    """The forward in whose place the layer's updates are: its plain class's, or what that goes through."""
    return _inner.get(type(layer), plain_class(layer)).forward


def itself(layer: Any) -> Any:
    """What the layer's own forward is to be called with: it has its own parameters, whatever they read as."""
    return shell(layer, {}) if type(layer) in _read else layer


def shell(layer: Any, values: Mapping[str, Tensor | None]) -> Any:
    """An object with the layer's class and attributes, but for these parameters: the layer itself may be in use by others."""
    shell = object.__new__(plain_class(layer))
    shell.__dict__ = {**vars(layer), "_parameters": {**layer._parameters, **values}}
    return shell
