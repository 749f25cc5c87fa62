"""Parameters that several layers of a model share: given to each of them alone, and shared again. Knows modules and their
configs, no adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_SETTING = "tie_word_embeddings"


@dataclass
class Untied:
    """What gives a model its ties back."""

    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    """Name of a parameter → the one that it shared with others."""
    configs: list[Any] = field(default_factory=list)
    """The configs that said so."""


def untie(owner: nn.Module, groups: Iterable[list[str]]) -> Untied:
    """Give a copy to each name of these groups of names of one parameter, but for the first of each group; and set the configs'
    `tie_word_embeddings` to false, by which transformers reads all of them from a checkpoint.

    Where a config's class or a model's own code holds to it (T5 scales what goes into its head by it), it stays: transformers
    then does not tie what a checkpoint has different values for."""
    untied = Untied()
    for names in groups:
        for name in names[1:]:
            module, own = _place(owner, name)
            parameter = module._parameters[own]
            assert parameter is not None
            untied.shared[name] = parameter
            module._parameters[own] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    for config in _saying_so(owner) if untied.shared else ():
        untied.configs.append(config)
        setattr(config, _SETTING, False)
    return untied


def tie(owner: nn.Module, untied: Untied) -> None:
    """Share the parameters again that were untied."""
    for name, parameter in untied.shared.items():
        module, own = _place(owner, name)
        module._parameters[own] = parameter
    for config in untied.configs:
        setattr(config, _SETTING, True)


def _place(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    layer, _, own = name.rpartition(".")
    return owner.get_submodule(layer), own


def _saying_so(owner: nn.Module) -> Iterator[Any]:
    """The configs of a model and of its parts that say that embeddings and heads are tied, each once."""
    if any(_SETTING in _source(module) for module in owner.modules() if hasattr(module, "config")):
        return
    seen: set[int] = set()
    configs: list[Any] = [getattr(module, "config", None) for module in owner.modules()]
    configs += [c.get_text_config() for c in configs if hasattr(c, "get_text_config")]
    for config in configs:
        if id(config) not in seen and getattr(config, _SETTING, False) is True and _switchable(config):
            yield config
        seen.add(id(config))


def _source(module: nn.Module) -> str:
    """The code of a module's forward, where that is to be had."""
    try:
        return inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return ""


def _switchable(config: Any) -> bool:
    """Whether a config of this class that is written with false is read with false."""
    try:
        return type(config).from_dict(untied_config(config.to_dict())).tie_word_embeddings is False
    except (AttributeError, TypeError, ValueError, KeyError):
        return False


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config as JSON has it, with `tie_word_embeddings` false, also in the configs inside it that say so."""
    return {**_without_ties(config), _SETTING: False}


def _without_ties(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: False if key == _SETTING and value is True else _without_ties(value) for key, value in config.items()}
