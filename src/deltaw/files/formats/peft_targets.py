"""The layers that the settings of a foreign adapter mean. No model code.

PEFT (0.21) makes the adapter's modules from target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save
and target_parameters alone. A key of the file without such a module is passed over. Files of deltaw mean all that they hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deltaw.files.formats.peft_config import CONFIG, NO_LAYERS
from deltaw.layers.names import other_names, unwrapped, unwrapped_pattern

# PEFT's word for all dense layers but the head
_ALL = "all-linear"
_NUMBERED = re.compile(r"\.\d+\.")
# The settings that choose layers
CHOOSING = (
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
)  # fmt: skip


def target_problems(config: Mapping[str, Any]) -> list[str]:
    """List what is wrong with the settings that choose layers, and which of them PEFT refuses together."""
    problems = [
        f"{CONFIG}: {key} is {config[key]!r}; it must be a list of names or a regular expression"
        for key in ("target_modules", "exclude_modules")
        if not (_are_names(config.get(key)) or _is_pattern(config.get(key)))
    ]
    problems += [
        f"{CONFIG}: {key} has {pattern!r}, which is no regular expression"
        for key in ("modules_to_save", "layers_pattern")
        for pattern in _listed(config.get(key))
        if not _is_pattern(pattern)
    ]
    numbers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if not all(type(number) is int for number in _listed(numbers)):
        problems.append(f"{CONFIG}: layers_to_transform is {numbers!r}; it must be a layer's number or a list of them")
    if isinstance(config.get("target_modules"), str) and not (numbers is None and pattern is None):
        problems.append(
            f"{CONFIG}: PEFT takes no layers_to_transform and no layers_pattern where target_modules is a text"
        )
    elif is_all_linear(config) and config.get("target_parameters"):
        problems.append(f"{CONFIG}: what 'all-linear' means beside target_parameters, only PEFT, on a model, can tell")
    elif pattern and numbers is None:
        problems.append(f"{CONFIG}: PEFT takes no layers_pattern without layers_to_transform")
    return problems


def is_meant(layer: str, config: Mapping[str, Any], *, dense: bool, stack: bool) -> bool | None:
    """Whether PEFT has a module for this layer of a file. `dense` tells that its A and B are no embedding's and no convolution's,
    `stack` that they are a stack's. None where only the model's modules tell."""
    module, wrapped, inside = unwrapped(layer).partition(".base_layer")
    by_name = is_target(module, config, dense=dense)
    if wrapped and inside.replace(".base_layer", ""):  # PEFT has an attention's output projection inside its wrapper
        return by_name
    return by_name or _any(by_name, _is_wrapped(module, layer.count(".base_layer"), config, stack))


def is_target(module: str, config: Mapping[str, Any], *, dense: bool = True) -> bool | None:
    """Whether target_modules means a module of this name, and no other setting takes it out. None where only the model tells."""
    plain = re.sub(r"^(module\.)+", "", module)  # DDP's
    names = dict.fromkeys((module, plain, *other_names(plain)))
    return _any(*(_chosen(name, config, dense) for name in names))


def by_default_targets(layer: str, config: Mapping[str, Any], *, stack: bool) -> bool:
    """Whether the settings leave this layer of a file to PEFT, which has default targets for some types of models."""
    module = unwrapped(layer).partition(".base_layer")[0]
    return config.get("target_modules") is None and not _is_wrapped(module, layer.count(".base_layer"), config, stack)


def is_all_linear(config: Mapping[str, Any]) -> bool:
    """Whether target_modules is PEFT's word for all dense layers but the head."""
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == _ALL


def with_tied(answers: Mapping[str, bool | None], config: Mapping[str, Any]) -> dict[str, bool | None]:
    """`is_meant`'s answers by layer, where PEFT gives an embedding's update to the head that is tied to it, or a head's to it."""
    outside = [layer for layer in answers if not _NUMBERED.search(layer)]
    tied = bool(config.get("ensure_weight_tying")) and any(answers[layer] for layer in outside)
    return {**answers, **(dict.fromkeys(outside, True) if tied else {})}


def told_by_name(layer: str, config: Mapping[str, Any]) -> bool:
    """Whether a layer, of which `is_meant` does not know it, is one of those that "all-linear" means in every usual model."""
    return is_all_linear(config) and _NUMBERED.search(layer) is not None


def parameters_anywhere(config: Mapping[str, Any]) -> set[str]:
    """The parameters that target_parameters means in whatever module."""
    return {name for name in config.get("target_parameters") or [] if "." not in name}


def _chosen(module: str, config: Mapping[str, Any], dense: bool) -> bool | None:
    targets = config.get("target_modules")
    saved = (unwrapped_pattern(name) for name in _listed(config.get("modules_to_save")))
    if _names(config.get("exclude_modules"), module) or any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in saved):
        return False
    if targets is None:  # PEFT's defaults, which are not in the file
        return True
    if is_all_linear(config):
        return None if dense else False
    if targets == NO_LAYERS or not _names(targets, module):
        return False
    # Of a module by its full name PEFT does not ask the number
    return isinstance(targets, str) or module in map(unwrapped_pattern, targets) or _has_number(module, config)


def _has_number(module: str, config: Mapping[str, Any]) -> bool:
    """Whether layers_to_transform has the number of the layer that the module is in: the first number in its name, or the first
    that stands behind one of layers_pattern."""
    numbers, patterns = config.get("layers_to_transform"), _listed(config.get("layers_pattern"))
    if numbers is None or numbers == []:
        return True
    rules = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for rule in rules if (match := re.match(rule, module))), None)
    return found is not None and int(found[found.lastindex or 1]) in _listed(numbers)


def _is_wrapped(module: str, depth: int, config: Mapping[str, Any], stack: bool) -> bool | None:
    """Whether target_parameters has so many parameters of a module that PEFT wraps it `depth` times and once more."""
    parts = [target.rpartition(".") for target in config.get("target_parameters") or []]
    named = {own for outer, _, own in parts if outer and f".{module}".endswith(f".{outer}")}
    if depth < len(named):
        return True
    if depth >= len(named | parameters_anywhere(config)):
        return False
    return True if stack or "experts" in module.rsplit(".", 1)[-1] else None


def _names(setting: Any, module: str) -> bool:
    """Whether a list of names, or a regular expression, means a module."""
    if isinstance(setting, str):
        return bool(setting) and re.fullmatch(unwrapped_pattern(setting), module) is not None
    names = map(unwrapped_pattern, setting or [])
    return any(module == name or module.endswith(f".{name}") for name in names)


def _any(*answers: bool | None) -> bool | None:
    """Whether one is true; None where that is not known."""
    return True if True in answers else None if None in answers else False


def _listed(value: Any) -> list[Any]:
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return isinstance(value, str)
