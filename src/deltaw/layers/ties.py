"""Parameters that several layers of a model share: copied for each of them, and shared again.

Knows modules and their configs, no adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from deltaw.layers.source import mentions

_SETTING = "tie_word_embeddings"


@dataclass
class Untied:
    """The values from which `tie` gives a model its ties back."""

    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    """Name of a parameter → the one that it shared with others."""
    configs: list[PreTrainedConfig] = field(default_factory=list)
    """The configs that said so."""


def untie(owner: nn.Module, groups: Iterable[list[str]]) -> Untied:
    """Give each layer that shares a parameter a copy of its own, but for the first of each group of names.

    The configs' `tie_word_embeddings` becomes false, by which transformers reads all of them from a checkpoint. Where a config's
    class or a model's own code depends on it (T5 scales what goes into its head by it), it stays: transformers then does not tie
    what a checkpoint has different values for.

    Args:
        owner: The model, changed in place.
        groups: The names of one parameter in each.

    Returns:
        What `tie` needs to undo it.
    """
    untied = Untied()
    for names in groups:
        for name in names[1:]:
            module, attribute = _place(owner, name)
            parameter = module._parameters[attribute]
            assert parameter is not None
            untied.shared[name] = parameter
            module._parameters[attribute] = nn.Parameter(
                parameter.detach().clone(), requires_grad=parameter.requires_grad
            )
    for config in _saying_so(owner) if untied.shared else ():
        untied.configs.append(config)
        setattr(config, _SETTING, False)
    return untied


def tie(owner: nn.Module, untied: Untied) -> None:
    """Share the parameters again that were untied."""
    for name, parameter in untied.shared.items():
        module, attribute = _place(owner, name)
        module._parameters[attribute] = parameter
    for config in untied.configs:
        setattr(config, _SETTING, True)


def _place(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has this parameter, and its name there."""
    layer, _, attribute = name.rpartition(".")
    return owner.get_submodule(layer), attribute


def _saying_so(owner: nn.Module) -> Iterator[PreTrainedConfig]:
    """Yield the configs of a model and of its parts that say that embeddings and heads are tied, each once."""
    if any(mentions(type(module).forward, _SETTING) for module in owner.modules() if hasattr(module, "config")):
        return
    seen: set[int] = set()
    attributes = [getattr(module, "config", None) for module in owner.modules()]
    configs = [config for config in attributes if isinstance(config, PreTrainedConfig)]
    for config in [*configs, *(config.get_text_config() for config in configs)]:
        if id(config) not in seen and getattr(config, _SETTING, False) is True and _switchable(config):
            yield config
        seen.add(id(config))


def _switchable(config: PreTrainedConfig) -> bool:
    """Return whether a config of this class that is written with false is read with false."""
    try:
        return type(config).from_dict(untied_config(config.to_dict())).tie_word_embeddings is False
    except (AttributeError, TypeError, ValueError, KeyError):
        return False


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as JSON has it, with `tie_word_embeddings` false, also in the configs inside it that say so."""
    return {**_without_ties(config), _SETTING: False}


def _without_ties(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: False if key == _SETTING and value is True else _without_ties(value) for key, value in config.items()}
