"""adapter_config.json: what its settings say about an adapter's tensors, and what is wrong in them. No model code."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw.errors import FileError
from deltaw.layers.names import unwrapped

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Config: the method's name, in files of ours for methods that PEFT has no form for; and its own names of those that it has
METHOD = "deltaw_method"
_OTHERS = {"IA3": "ia3", "PROMPT_TUNING": "prefix"}

_LATER = "deltaw does not read that"
_TRAINED_ON_ANOTHER_W0 = (
    "this start changes W0, so that A and B alone mean nothing; PEFT's save_pretrained(…, "
    "path_initial_model_for_weight_conversion=…) writes an adapter of the original W0"
)
# Settings that change what the tensors mean: the values that are read, and why no others
SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), "deltaw reads LORA, IA3 and PROMPT_TUNING of PEFT's methods"),
    "use_dora": ((True, False, None), _LATER),
    "bias": (("none", "all", "lora_only", None), _LATER),
    "lora_bias": ((True, False, None), _LATER),
    "layer_replication": ((None, []), "it makes another model of the base, with layers that are there twice"),
    "alora_invocation_tokens": ((None, []), "its branch is on for some positions only"),
    "use_qalora": ((False, None), _LATER),
    "megatron_config": ((None,), _LATER),
    "arrow_config": ((None,), _LATER),
    "kasa_config": ((None,), _LATER),
    "monteclora_config": ((None,), _LATER),
    "use_bdlora": ((None, False), _LATER),
    "init_lora_weights": ((True, False, None, "gaussian", "eva", "orthogonal", "mica"), _TRAINED_ON_ANOTHER_W0),
}
# Settings that are read, each elsewhere
READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "target_modules", "target_parameters",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "base_model_name_or_path",
}  # fmt: skip
# Settings that say how an adapter was made, or where; its tensors mean the same
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "qalora_group_size", "runtime_config", "merge_weights",
}  # fmt: skip
# PEFT's target_modules of an adapter without A and B, which it refuses by any other value
NO_LAYERS = "dummy-target-modules"
KNOWN = SETTINGS.keys() | READ | HARMLESS
_NUMBERS = ("r", "lora_alpha")

# All that PEFT's config has of the other methods that are read, and what every config has
OF_OTHERS = {
    "IA3": {"target_modules", "feedforward_modules", "init_ia3_weights"},
    "PROMPT_TUNING": {
        "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    },
}  # fmt: skip
OF_ALL = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "modules_to_save", "fan_in_fan_out", "exclude_modules",
}  # fmt: skip

# The parameters of transformers' experts in the order that their modules have them in. PEFT wraps the last one outermost
_IN_ORDER = ("gate_up_proj", "down_proj")


def read_config(folder: Path) -> dict[str, Any]:
    """Raises FileError where the folder is none of an adapter."""
    if not folder.is_dir():
        raise FileError(f"There is no adapter folder {folder}.")
    missing = [] if (folder / CONFIG).is_file() else [CONFIG]
    if not ((folder / WEIGHTS).is_file() or (folder / PICKLED).is_file()):
        missing.append(WEIGHTS)
    if missing:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))  # PEFT's place for adapters with names
        hint = f" Adapters are in its folders {', '.join(inside)}: give one of these." if inside else ""
        raise FileError(f"{folder} is not an adapter folder: {' and '.join(missing)} missing. In it: {there}.{hint}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FileError(f"{folder / CONFIG} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise FileError(f"{folder / CONFIG} holds a {type(config).__name__}, not an object of settings.")
    return config


def method_of(folder: Path) -> str | None:
    """The method of an adapter folder, as methods/registry.py names it; None for LoRA's, and for what LoRA's reader has to
    refuse. Raises FileError where the folder is none of an adapter."""
    config = read_config(folder)
    return config.get(METHOD) or _OTHERS.get(str(config.get("peft_type")))


def setting_problems(config: Mapping[str, Any]) -> list[str]:
    """Each setting under which the tensors mean something else than what is read, and each that is no sound value."""
    kind = config.get("peft_type")
    if kind not in SETTINGS["peft_type"][0]:  # whose settings mean other things
        return [f"{CONFIG}: peft_type is {kind!r}: {SETTINGS['peft_type'][1]}"]
    problems = [
        f"{CONFIG}: {key} is {config[key]!r}: {why}"
        for key, (read, why) in SETTINGS.items()
        if key in config and config[key] not in read
    ]
    return problems + unknown_problems(config, KNOWN) + _number_problems(config) + _name_problems(config)


def unknown_problems(config: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """The flags and groups of settings that are not among `known` and are on."""
    return [
        f"{CONFIG}: {key} is {value!r}: this version of deltaw does not know what that changes"
        for key, value in config.items()
        if key not in known and (value is True or (isinstance(value, (dict, list)) and value))
    ]


def unknown_settings(config: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """The numbers and texts that are not among `known`: what they change is not known."""
    return sorted(
        f"{key} = {value!r}"
        for key, value in config.items()
        if key not in known and not isinstance(value, (bool, dict, list)) and value not in (None, "")
    )


def _number_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings that ranks and scales are computed from."""
    problems = [f"{CONFIG}: {key} is missing, so the scale α/r is unknown" for key in _NUMBERS if key not in config]
    values = {key: config[key] for key in _NUMBERS if key in config}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if isinstance(patterns, Mapping):
            values |= {f"{key}[{pattern!r}]": value for pattern, value in patterns.items()}
            problems += [
                f"{CONFIG}: {key} has {p!r}, which is no regular expression" for p in patterns if not _compiles(p)
            ]
        else:
            problems.append(f"{CONFIG}: {key} is {patterns!r}; it must map names of layers to numbers")
    problems += [
        f"{CONFIG}: {key} is {value!r}; it must be a number above 0"
        for key, value in values.items()
        if not (_is_number(value) and 0 < value < float("inf"))
    ]
    dropout = config.get("lora_dropout") or 0.0
    if not (_is_number(dropout) and 0 <= dropout < 1):
        problems.append(f"{CONFIG}: lora_dropout is {dropout!r}; it must be a probability below 1")
    if config.get("use_rslora") not in (True, False, None):
        problems.append(f"{CONFIG}: use_rslora is {config['use_rslora']!r}; it must be true or false")
    return problems


def _name_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings that name modules and tokens."""
    problems = []
    modules = config.get("modules_to_save")
    if not (modules is None or (isinstance(modules, list) and all(isinstance(name, str) for name in modules))):
        problems.append(f"{CONFIG}: modules_to_save is {modules!r}; it must be a list of names")
    parameters = config.get("target_parameters")
    if not (parameters is None or (isinstance(parameters, list) and all(isinstance(name, str) for name in parameters))):
        problems.append(f"{CONFIG}: target_parameters is {parameters!r}; it must be a list of names")
    tokens = config.get("trainable_token_indices")
    lists = [*tokens.values()] if isinstance(tokens, Mapping) else [tokens]
    if not all(each is None or _are_ids(each) for each in lists):
        problems.append(f"{CONFIG}: trainable_token_indices is {tokens!r}; it must hold ids of tokens, none twice")
    return problems


def _are_ids(values: Any) -> bool:
    whole = isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
    return whole and len(set(values)) == len(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(_matching(pattern))
    except re.error:
        return False
    return True


def rank_of(layer: str, config: Mapping[str, Any]) -> Any:
    """The rank that the config gives a layer."""
    return _values(layer, config, "rank_pattern", config["r"])[0]


def rank_in(layer: str, A: Tensor, config: Mapping[str, Any]) -> int:
    """The r of a layer with this A: its rows, and of a stack of matrices, whose A's stand one under the other, those of one."""
    rows = A.shape[0]
    if not config.get("target_parameters"):
        return rows
    expected = rank_of(layer, config)
    return expected if isinstance(expected, int) and expected > 0 and rows % expected == 0 else rows


def scale_of(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """The factor of a layer's BA."""
    alpha = _values(layer, config, "alpha_pattern", config["lora_alpha"])[0]
    return _scale(alpha, rank, rank_stabilised=bool(config.get("use_rslora")))


def _scale(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """PEFT's arithmetic."""
    return alpha / rank**0.5 if rank_stabilised else alpha / rank


def alpha_for(scale: float, rank: int, *, rank_stabilised: bool) -> float:
    """The α that gives this scale back to the last bit, a whole number where one does. Some scales no α gives: then the α of the
    next number, 2^-52 of it away at the most."""
    near = scale * (rank**0.5 if rank_stabilised else rank)
    candidates = [near, math.nextafter(near, 0.0), math.nextafter(near, math.inf)]
    whole = [round(near)] if abs(near) < 2**53 and round(near) > 0 else []
    return min([*whole, *candidates], key=lambda a: abs(_scale(a, rank, rank_stabilised=rank_stabilised) - scale))


def pattern_problem(layer: str, config: Mapping[str, Any]) -> str | None:
    """Where the patterns tell apart what the file does not."""
    for key, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        values = _values(layer, config, key, default)
        if len(values) > 1:
            names = " and ".join(sorted(pattern_names(layer, config)))
            return (
                f"{key} gives {names} different values ({values}), and the file does not say whose A and B these are; only PEFT, "
                "on a model, can tell"
            )
    return None


def pattern_names(layer: str, config: Mapping[str, Any]) -> list[str]:
    """The names that PEFT compares its patterns with, for a layer of the file: its own; or of a weight that has no layer, whose
    name in the file is that of its module, the parameter's. Several where neither the file nor an order that all of transformers'
    experts have says which of the module's parameters it is."""
    module, depth = unwrapped(layer).split(".base_layer")[0], layer.count(".base_layer")
    parameters = [target.rpartition(".") for target in config.get("target_parameters") or []]
    inside = [own for outer, _, own in parameters if outer and f".{module}".endswith(f".{outer}")]
    anywhere = [own for outer, _, own in parameters if not outer]
    if not depth and "experts" not in module.rsplit(".", 1)[-1]:
        if inside:
            return [f"{module}.{own}" for own in inside]
        return [module] if _is_target(module, config) else [module, *(f"{module}.{own}" for own in anywhere)]
    wanted = list(dict.fromkeys([*inside, *anywhere]))
    if wanted and set(wanted) <= set(_IN_ORDER) and depth < len(wanted):
        return [f"{module}.{sorted(wanted, key=_IN_ORDER.index)[-1 - depth]}"]
    return [f"{module}.{own}" for own in inside] or [module, *(f"{module}.{own}" for own in anywhere)]


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    """Whether target_modules means this module; of the file's layers, one that it does not mean has target_parameters."""
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return _compiles(targets) and re.fullmatch(targets, module) is not None
    return isinstance(targets, list) and any(module == t or module.endswith(f".{t}") for t in targets)


def _values(layer: str, config: Mapping[str, Any], key: str, default: Any) -> list[Any]:
    """What patterns give a layer, once each: one value unless they tell apart what the file does not. Files of ours have a
    pattern of its name in the file, which PEFT passes over where that is none of its names."""
    patterns, own, names = config.get(key) or {}, exactly(unwrapped(layer)), pattern_names(layer, config)
    if own in patterns and unwrapped(layer) not in names:
        return [patterns[own]]
    return list(dict.fromkeys(_by_pattern(name, patterns, default) for name in names))


def exactly(layer: str) -> str:
    """The pattern of one layer."""
    return rf"^{re.escape(layer)}"


def _by_pattern(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """PEFT's rule: the first pattern, in the file's order, that matches the end of the name from a dot (or its start) on. PEFT
    sorts them when it saves, so that a file may mean another one than its training did."""
    for pattern, value in patterns.items():
        rule = _rule(pattern)
        if rule == name if isinstance(rule, str) else rule.match(name):
            return value
    return default


@lru_cache(maxsize=1 << 14)
def _rule(pattern: str) -> str | re.Pattern[str]:
    """The name that a pattern is of, where it is of one alone: there may be one for each of a thousand layers. Else its regex."""
    name = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"))
    return name if pattern == exactly(name) else re.compile(_matching(pattern))


def _matching(pattern: str) -> str:
    """What PEFT compiles of a pattern; groups in it count from this one's."""
    return rf"(.*\.)?({pattern})$"


def tokens_of(layer: str, config: Mapping[str, Any]) -> list[int] | None:
    """The tokens whose rows a layer's file has: all layers' where the setting is one list, else by the end of the name."""
    tokens = config.get("trainable_token_indices")
    if not isinstance(tokens, Mapping):
        return tokens
    return next((ids for name, ids in tokens.items() if layer == name or layer.endswith(f".{name}")), None)


def saved_module(name: str, config: Mapping[str, Any]) -> str | None:
    """The module that an entry of modules_to_save means: that of this parameter, or one around it."""
    parts = unwrapped(name).split(".")[:-1]
    for entry in config.get("modules_to_save") or []:
        own = entry.split(".")
        ends = (i + len(own) for i in range(len(parts)) if parts[i : i + len(own)] == own)
        if (end := next(ends, None)) is not None:
            return ".".join(parts[:end])
    return None


def config_for(
    ranks: Mapping[str, int], scales: Mapping[str, float], *, target_modules: list[str], dropout: float, rank_stabilised: bool,
    transposed: bool, base: str | None, task: str | None, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """adapter_config.json for these ranks and scales: the commonest rank and α as r and lora_alpha, others by pattern. `others`
    are settings in place of those for A and B alone."""
    alphas = {layer: alpha_for(scales[layer], r, rank_stabilised=rank_stabilised) for layer, r in ranks.items()}
    r, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": task,
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
    }


def _patterns(values: Mapping[str, Any], commonest: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    """Those that differ; beside weights without layers all of them, for a weight's is read wherever its module's layers have
    none."""
    beside = bool(others.get("target_parameters")) or any(".base_layer" in layer for layer in values)
    every = beside and len(set(values.values())) > 1
    return {exactly(layer): x for layer, x in values.items() if every or x != commonest}


def _commonest(values: list[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count, default=1)
