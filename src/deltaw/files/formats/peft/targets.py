"""The layers, modules and tokens that the settings of an adapter mean. No model code.

PEFT (0.21) makes the adapter's modules from target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save
and target_parameters alone. A key of the file without such a module is passed over. Files of deltaw mean all that they hold.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from deltaw.errors import FileError, shown
from deltaw.files.formats.peft import patterns
from deltaw.files.formats.peft.config import CONFIG, NO_LAYERS, Names, PeftConfig, are_names, is_pattern, listed
from deltaw.layers.names import in_order, other_names, unwrapped, unwrapped_pattern

log = logging.getLogger("deltaw")

# PEFT's word for all dense layers but the head
_ALL = "all-linear"
# A layer's number between dots; the dot after it may be the next one's
_NUMBER = re.compile(r"\.(\d{1,9})(?=\.)")
_NUMBERED = re.compile(r"\.\d+\.")
# The settings that choose layers
CHOOSING = (
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
)  # fmt: skip


def target_problems(settings: Mapping[str, object]) -> list[str]:
    """List what is wrong with the settings that choose layers, and which of them PEFT refuses together."""
    targets, parameters = settings.get("target_modules"), settings.get("target_parameters")
    numbers, pattern = settings.get("layers_to_transform"), settings.get("layers_pattern")
    problems = [
        f"{CONFIG}: {key} is {settings[key]!r}; it must be a list of names or a regular expression"
        for key in ("target_modules", "exclude_modules")
        if not (are_names(settings.get(key)) or is_pattern(settings.get(key)))
    ]
    problems += [
        f"{CONFIG}: {key} has {value!r}, which is no regular expression"
        for key, rule in (("modules_to_save", _as_part), ("layers_pattern", _before_number))
        for value in listed(settings.get(key))
        if not (isinstance(value, str) and is_pattern(rule(value)))
    ]
    if not all(type(number) is int for number in listed(numbers)):
        problems.append(f"{CONFIG}: layers_to_transform is {numbers!r}; it must be a layer's number or a list of them")
    if isinstance(targets, str) and not (numbers is None and pattern is None):
        problems.append(
            f"{CONFIG}: PEFT takes no layers_to_transform and no layers_pattern where target_modules is a text"
        )
    elif isinstance(targets, str) and targets.lower() == _ALL and parameters:
        problems.append(f"{CONFIG}: what 'all-linear' means beside target_parameters, only PEFT, on a model, can tell")
    elif pattern and numbers is None:
        problems.append(f"{CONFIG}: PEFT takes no layers_pattern without layers_to_transform")
    return problems


# --- layers -----------------------------------------------------------------------------------------------------


def is_meant(layer: str, config: PeftConfig, *, dense: bool, stack: bool) -> bool | None:
    """Return whether PEFT has a module for this layer of a file; None where only the model's modules tell.

    Args:
        layer: its name in the file.
        config: the adapter's settings.
        dense: its A and B are no embedding's and no convolution's.
        stack: its A and B are those of a stack of matrices.
    """
    module, wrapped, inside = unwrapped(layer).partition(".base_layer")
    by_name = is_target(module, config, dense=dense)
    if wrapped and inside.replace(".base_layer", ""):  # PEFT has an attention's output projection inside its wrapper
        return by_name
    return by_name or _any(by_name, _is_wrapped(module, layer.count(".base_layer"), config, stack))


def is_target(module: str, config: PeftConfig, *, dense: bool = True) -> bool | None:
    """Return whether target_modules means a module of this name, and no other setting takes it out.

    None where only the model tells.
    """
    plain = re.sub(r"^(module\.)+", "", module)  # DDP's
    names = dict.fromkeys((module, plain, *other_names(plain)))
    return _any(*(_chosen(name, config, dense) for name in names))


def by_default_targets(layer: str, config: PeftConfig, *, stack: bool) -> bool:
    """True where the settings leave this layer to PEFT, which has default targets for some types of models."""
    module = unwrapped(layer).partition(".base_layer")[0]
    return config.target_modules is None and not _is_wrapped(module, layer.count(".base_layer"), config, stack)


def is_all_linear(config: PeftConfig) -> bool:
    """True where target_modules is PEFT's word for all dense layers but the head."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == _ALL


def with_tied(answers: Mapping[str, bool | None], config: PeftConfig) -> dict[str, bool | None]:
    """Return `is_meant`'s answers by layer, with yes for both of a tied embedding and head where one of them has it.

    PEFT gives an embedding's update to the head that is tied to it, or a head's to the embedding, with ensure_weight_tying.
    """
    outside = [layer for layer in answers if not _NUMBERED.search(layer)]
    tied = config.ensure_weight_tying and any(answers[layer] for layer in outside)
    return {**answers, **(dict.fromkeys(outside, True) if tied else {})}


def told_by_name(layer: str, config: PeftConfig) -> bool:
    """True for a layer that "all-linear" means in every usual model, though `is_meant` cannot tell."""
    return is_all_linear(config) and _NUMBERED.search(layer) is not None


def parameters_anywhere(config: PeftConfig) -> set[str]:
    """Return the parameters that target_parameters means in any module."""
    return {name for name in config.target_parameters if "." not in name}


def left_out(answers: Mapping[str, bool | None], config: PeftConfig, path: Path) -> list[str]:
    """Return the layers of the file `path` for which `is_meant` answers no, and log them.

    Raises:
        FileError: where the answer is no for all of them.
    """
    layers = in_order(layer for layer, answer in answers.items() if answer is False)
    settings = ", ".join(key for key in CHOOSING if config.settings.get(key) is not None)
    if layers and len(layers) == len(answers):
        raise FileError(
            f"The adapter in {path.parent} cannot be used: its settings ({settings}) mean none of the {len(answers)} layers in "
            f"{path.name}, {shown(layers)}."
        )
    if layers:
        log.warning(
            "%d of the %d layers in %s are left out, as PEFT leaves them out: its settings (%s) do not mean %s.",
            len(layers), len(answers), path.parent, settings, shown(layers),
        )  # fmt: skip
    return layers


def _chosen(module: str, config: PeftConfig, dense: bool) -> bool | None:
    """Return `is_target`'s answer for one of a module's names."""
    targets = config.target_modules
    saved = (unwrapped_pattern(name) for name in config.modules_to_save)
    if names(config.exclude_modules, module) or any(patterns.starts(_as_part(m), module) for m in saved):
        return False
    if targets is None:  # PEFT's defaults, which are not in the file
        return True
    if is_all_linear(config):
        return None if dense else False
    if targets == NO_LAYERS or not names(targets, module):
        return False
    # PEFT does not ask the number of a module with its full name in the list
    return isinstance(targets, str) or module in map(unwrapped_pattern, targets) or _has_number(module, config)


def _as_part(pattern: str) -> str:
    """Return the regular expression that PEFT makes of an entry of modules_to_save."""
    return rf"(^|.*\.){pattern}($|\..*)"


def _before_number(pattern: str) -> str:
    """Return the regular expression of what stands before a layer's number, by an entry of layers_pattern."""
    return rf"(?:^|.*\.){pattern}"


def _has_number(module: str, config: PeftConfig) -> bool:
    """Return whether layers_to_transform has the number of the layer that the module is in.

    That is the first number in its name, or the first that stands behind one of layers_pattern.
    """
    if not config.layers_to_transform:
        return True
    outer = [_before_number(p) for p in config.layers_pattern] or [r".*\.[^.]*"]
    numbers = [(module[: match.start()], int(match[1])) for match in _NUMBER.finditer(module)]
    first = next((n for rule in outer for before, n in numbers if patterns.matches(rule, before)), None)
    return first in config.layers_to_transform


def _is_wrapped(module: str, depth: int, config: PeftConfig, stack: bool) -> bool | None:
    """Return whether target_parameters has so many of a module's parameters that PEFT wraps it `depth` + 1 times."""
    parts = [target.rpartition(".") for target in config.target_parameters]
    by_module = {parameter for outer, _, parameter in parts if outer and f".{module}".endswith(f".{outer}")}
    if depth < len(by_module):
        return True
    if depth >= len(by_module | parameters_anywhere(config)):
        return False
    return True if stack or "experts" in module.rsplit(".", 1)[-1] else None


def names(setting: Names, module: str) -> bool:
    """Return whether a list of names, or a regular expression, means a module."""
    if isinstance(setting, str):
        return bool(setting) and patterns.matches(unwrapped_pattern(setting), module)
    return any(module == name or module.endswith(f".{name}") for name in map(unwrapped_pattern, setting or ()))


def _any(*answers: bool | None) -> bool | None:
    """Return whether one answer is yes; None where that is not known."""
    return True if True in answers else None if None in answers else False


# --- modules and tokens -----------------------------------------------------------------------------------------


def tokens_of(layer: str, config: PeftConfig) -> tuple[int, ...] | None:
    """Return the tokens whose rows a layer has in the file, in the file's order; None without any."""
    tokens = config.trainable_token_indices
    if not isinstance(tokens, Mapping):
        return tokens
    return next((ids for name, ids in tokens.items() if layer == name or layer.endswith(f".{name}")), None)


def saved_module(name: str, config: PeftConfig) -> str | None:
    """Return the module that an entry of modules_to_save means: the one of this parameter, or one around it."""
    parts = unwrapped(name).split(".")[:-1]
    for entry in config.modules_to_save:
        wanted = entry.split(".")
        ends = (i + len(wanted) for i in range(len(parts)) if parts[i : i + len(wanted)] == wanted)
        if (end := next(ends, None)) is not None:
            return ".".join(parts[:end])
    return None
