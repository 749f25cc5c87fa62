"""Ranks and scales that an adapter's settings give a layer, and the settings that give them. No model code."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from torch import Tensor

from deltaw.files.formats.peft import patterns
from deltaw.files.formats.peft.config import NO_LAYERS, WRITTEN_AS, PeftConfig, in_pattern
from deltaw.files.formats.peft.targets import is_target
from deltaw.layers.names import unwrapped

# The parameters of transformers' experts in the order that their modules have them in. PEFT wraps the last one outermost
_IN_ORDER = ("gate_up_proj", "down_proj")

_Number = TypeVar("_Number", int, float)


def rank_of(layer: str, config: PeftConfig) -> int:
    """Return the rank that the settings give a layer."""
    return _values(layer, config, config.rank_pattern, config.r)[0]


def rank_in(layer: str, A: Tensor, config: PeftConfig) -> int:
    """Return r of a layer with this A [r, k]; of a stack of E matrices, whose A is [E·r, k], that of each matrix."""
    rows = A.shape[0]
    if not config.target_parameters:
        return rows
    expected = rank_of(layer, config)
    return expected if rows % expected == 0 else rows


def scale_of(layer: str, rank: int, config: PeftConfig) -> float:
    """Return the factor of a layer's BA."""
    alpha = _values(layer, config, config.alpha_pattern, config.lora_alpha)[0]
    return _scale(alpha, rank, rank_stabilised=config.use_rslora)


def _scale(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """Return α/r, of rsLoRA α/√r, by PEFT's arithmetic."""
    return alpha / rank**0.5 if rank_stabilised else alpha / rank


def alpha_for(scale: float, rank: int, *, rank_stabilised: bool) -> float:
    """Return the α that gives this scale back to the last bit, a whole number where one does.

    Some scales no α gives. Then it is the α of a neighbouring number, at most 2^-52 of the scale away.
    """
    near = scale * (rank**0.5 if rank_stabilised else rank)
    candidates = [near, math.nextafter(near, 0.0), math.nextafter(near, math.inf)]
    whole = [round(near)] if abs(near) < 2**53 and round(near) > 0 else []
    return min([*whole, *candidates], key=lambda a: abs(_scale(a, rank, rank_stabilised=rank_stabilised) - scale))


def pattern_problem(layer: str, config: PeftConfig) -> str | None:
    """Say where the patterns tell apart what the file does not."""
    all_values: dict[str, Sequence[float]] = {
        "rank_pattern": _values(layer, config, config.rank_pattern, config.r),
        "alpha_pattern": _values(layer, config, config.alpha_pattern, config.lora_alpha),
    }
    for key, values in all_values.items():
        if len(values) > 1:
            names = " and ".join(sorted(pattern_names(layer, config)))
            return (
                f"{key} gives {names} different values ({list(values)}), and the file does not say whose A and B these are; only "
                "PEFT, on a model, can tell"
            )
    return None


def pattern_names(layer: str, config: PeftConfig) -> list[str]:
    """Return the names that PEFT compares its patterns with, for a layer of the file.

    A layer has its name. A weight without a layer has the parameter's name, but in the file it stands under its module's. Several
    are returned where neither the file nor the order of transformers' experts says which of the module's parameters it is.
    """
    module, depth = unwrapped(layer).split(".base_layer")[0], layer.count(".base_layer")
    if not config.target_parameters:
        return [module]
    parameters = [target.rpartition(".") for target in config.target_parameters]
    inside = [parameter for outer, _, parameter in parameters if outer and f".{module}".endswith(f".{outer}")]
    anywhere = [parameter for outer, _, parameter in parameters if not outer]
    if not depth and "experts" not in module.rsplit(".", 1)[-1]:
        if inside:
            return [f"{module}.{parameter}" for parameter in inside]
        a_layer = config.target_modules is not None and is_target(module, config) is True
        return [module] if a_layer else [module, *(f"{module}.{parameter}" for parameter in anywhere)]
    wanted = list(dict.fromkeys([*inside, *anywhere]))
    if wanted and set(wanted) <= set(_IN_ORDER) and depth < len(wanted):
        return [f"{module}.{sorted(wanted, key=_IN_ORDER.index)[-1 - depth]}"]
    names = [f"{module}.{parameter}" for parameter in inside]
    return names or [module, *(f"{module}.{parameter}" for parameter in anywhere)]


def _values(layer: str, config: PeftConfig, by_pattern: Mapping[str, _Number], default: _Number) -> list[_Number]:
    """Return what patterns give a layer, once each: one value unless they tell apart what the file does not.

    Files of ours have a pattern of the layer's name in the file. PEFT passes over it where that is none of its own names.
    """
    exact, names = exactly(unwrapped(layer)), pattern_names(layer, config)
    if exact in by_pattern and unwrapped(layer) not in names:
        return [by_pattern[exact]]
    return list(dict.fromkeys(_by_pattern(name, by_pattern, default) for name in names))


def exactly(layer: str) -> str:
    """Return the pattern that only this layer matches."""
    return rf"^{re.escape(layer)}"


def _by_pattern(name: str, by_pattern: Mapping[str, _Number], default: _Number) -> _Number:
    """Return the value of the first pattern, in the file's order, that matches the end of the name from a dot or its start on.

    This is PEFT's rule. PEFT sorts patterns when it saves, so that a file may mean others than its training did.
    """
    for pattern, value in by_pattern.items():
        only = _only_name(pattern)
        if only is not None:
            meant = only == name
        elif patterns.is_plain(pattern) and not name.endswith("\n"):
            meant = patterns.ends_in(pattern, name)
        else:
            meant = patterns.starts(in_pattern(pattern), name)
        if meant:
            return value
    return default


@lru_cache(maxsize=1 << 14)
def _only_name(pattern: str) -> str | None:
    """Return the one name that a pattern of `exactly` matches, since an adapter may have thousands of these; else None."""
    name = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"))
    return name if pattern == exactly(name) else None


# --- the settings for ranks and scales --------------------------------------------------------------------------


def config_for(
    ranks: Mapping[str, int], scales: Mapping[str, float], *, target_modules: Sequence[str], dropout: float = 0.0,
    rank_stabilised: bool = False, transposed: bool = False, base: str | None = None, task: str | None = None, **others: object,
) -> PeftConfig:  # fmt: skip
    """Return the settings of an adapter with these ranks and scales.

    Args:
        ranks: layer name → r. The commonest is the setting r, others are patterns.
        scales: layer name → the factor of BA. The commonest α is lora_alpha, others are patterns.
        target_modules: the names of the adapted layers.
        dropout: the probability to drop an input of A.
        rank_stabilised: rsLoRA's α/√r.
        transposed: the weights are stored [k, d].
        base: the base's name.
        task: PEFT's name of the task.
        others: settings in place of those for A and B alone.
    """
    alphas = {layer: alpha_for(scales[layer], r, rank_stabilised=rank_stabilised) for layer, r in ranks.items()}
    r, alpha = commonest(list(ranks.values()), 1), commonest(list(alphas.values()), 1)
    return PeftConfig.of({
        "peft_type": "LORA",
        "task_type": task,
        "peft_version": WRITTEN_AS,
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, r, others),
        "alpha_pattern": _patterns(alphas, alpha, others),
        "target_modules": sorted(target_modules) if ranks else NO_LAYERS,
        "target_parameters": None,
        "lora_dropout": dropout,
        "use_rslora": rank_stabilised,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
        **others,
    })  # fmt: skip


def _patterns(values: Mapping[str, _Number], usual: _Number, others: Mapping[str, object]) -> dict[str, _Number]:
    """Return patterns for the values that differ from the usual one.

    Beside weights without layers it returns all of them. PEFT reads such a weight's pattern where its module's layers have none.
    """
    beside = bool(others.get("target_parameters")) or any(".base_layer" in layer for layer in values)
    every = beside and len(set(values.values())) > 1
    return {exactly(layer): value for layer, value in values.items() if every or value != usual}


def commonest(values: Sequence[_Number], default: _Number) -> _Number:
    """Return the value that is there most often, of several the first."""
    return max(dict.fromkeys(values), key=values.count, default=default)
