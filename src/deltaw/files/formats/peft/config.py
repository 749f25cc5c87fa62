"""adapter_config.json as one value: its settings by their types, and what is wrong with them. No model code."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from deltaw.errors import FileError
from deltaw.files.formats.atomic import put_back
from deltaw.files.formats.peft.patterns import is_plain, problem
from deltaw.files.formats.strict_json import is_natural, read_object

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Setting in files of ours: the method's name, for methods that PEFT has no form for
METHOD = "deltaw_method"
# PEFT's methods that methods/registry.py has by another name
_OTHERS = {"IA3": "ia3", "PROMPT_TUNING": "prefix"}

_LATER = "deltaw does not read that"
_TRAINED_ON_ANOTHER_W0 = (
    "this start changes W0, so that A and B alone mean nothing; PEFT's save_pretrained(…, "
    "path_initial_model_for_weight_conversion=…) writes an adapter of the original W0"
)
# Settings that change what the tensors mean: the values that are read, and why no others
SETTINGS: dict[str, tuple[tuple[object, ...], str]] = {
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
# Settings that are fields of PeftConfig
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
KNOWN = SETTINGS.keys() | READ | HARMLESS
# Version of PEFT whose form our files have
WRITTEN_AS = "0.21.0"
# PEFT's target_modules of an adapter without A and B, which it refuses with any other value
NO_LAYERS = "dummy-target-modules"

# All settings of the other methods that are read, and those that every config has
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

UNKNOWN = "The settings of %s have %s, which this version of deltaw does not know: what they change is left out."

Names = str | tuple[str, ...] | None
"""A regular expression, or the ends of names; None where the setting is missing."""


@dataclass(frozen=True)
class PeftConfig:
    """The settings that decide what an adapter's tensors mean, each a field of PEFT's own name.

    A value of a wrong type counts as the default here. `setting_problems` and targets.py's `target_problems` name it.
    """

    settings: Mapping[str, object]
    """All of the file, also what is no field, as it is written back."""
    peft_type: str | None
    method: str | None
    """The name under METHOD, in files of ours."""
    base_model_name_or_path: str | None
    task_type: str | None
    peft_version: str | None
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    """Pattern of names → r."""
    alpha_pattern: Mapping[str, float]
    """Pattern of names → lora_alpha."""
    use_rslora: bool
    lora_dropout: float
    use_dora: bool
    bias: str
    target_modules: Names
    target_parameters: tuple[str, ...]
    exclude_modules: Names
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None
    ensure_weight_tying: bool
    feedforward_modules: Names
    """(IA)³'s layers whose inputs are scaled."""
    num_virtual_tokens: int | None
    """Length of a prompt, in prompt tuning."""

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> PeftConfig:
        """Return these settings by their types."""
        return cls(
            settings=settings,
            peft_type=_text(settings.get("peft_type")),
            method=_text(settings.get(METHOD)),
            base_model_name_or_path=_text(settings.get("base_model_name_or_path")),
            task_type=_text(settings.get("task_type")),
            peft_version=_text(settings.get("peft_version")),
            r=_whole(settings.get("r")) or 1,
            lora_alpha=_positive(settings.get("lora_alpha")) or 1.0,
            rank_pattern={p: r for p, v in _mapping(settings.get("rank_pattern")).items() if (r := _whole(v))},
            alpha_pattern={p: a for p, v in _mapping(settings.get("alpha_pattern")).items() if (a := _positive(v))},
            use_rslora=bool(settings.get("use_rslora")),
            lora_dropout=float(_positive(settings.get("lora_dropout")) or 0.0),
            use_dora=bool(settings.get("use_dora")),
            bias=_text(settings.get("bias")) or "none",
            target_modules=_names(settings.get("target_modules")),
            target_parameters=_texts(settings.get("target_parameters")),
            exclude_modules=_names(settings.get("exclude_modules")),
            layers_to_transform=tuple(n for n in listed(settings.get("layers_to_transform")) if type(n) is int),
            layers_pattern=_texts(listed(settings.get("layers_pattern"))),
            modules_to_save=_texts(settings.get("modules_to_save")),
            trainable_token_indices=_tokens(settings.get("trainable_token_indices")),
            ensure_weight_tying=bool(settings.get("ensure_weight_tying")),
            feedforward_modules=_names(settings.get("feedforward_modules")),
            num_virtual_tokens=_whole(settings.get("num_virtual_tokens")),
        )

    @property
    def base(self) -> str | None:
        """The base that it names, for readers, with its revision on the hub where it names one."""
        revision = _text(self.settings.get("revision"))
        named = self.base_model_name_or_path
        return f"{named} at revision {revision}" if named and revision not in (None, "main") else named

    def changed(self, **settings: object) -> PeftConfig:
        """Return the same settings but for these."""
        return PeftConfig.of({**self.settings, **settings})

    @property
    def biases_trained(self) -> bool:
        """The biases beside updates are trained ones, not copies of the base's."""
        return self.bias in ("all", "lora_only")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: object) -> int | float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _positive(value: object) -> int | float | None:
    """Return a number above 0 that a float can hold; else None."""
    number = _number(value)
    return number if number is not None and 0 < number <= sys.float_info.max else None


def _whole(value: object) -> int | None:
    """Return a whole number above 0, also one that was written as 8.0; else None."""
    number = _positive(value)
    return int(number) if number is not None and number == int(number) else None


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _texts(value: object) -> tuple[str, ...]:
    return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()


def _names(value: object) -> Names:
    return value if isinstance(value, str) else _texts(value) if isinstance(value, list) else None


def _tokens(value: object) -> tuple[int, ...] | Mapping[str, tuple[int, ...]] | None:
    if isinstance(value, Mapping):
        return {name: tuple(ids) for name, ids in value.items() if isinstance(ids, list) and _are_ids(ids)}
    return tuple(value) if isinstance(value, list) and _are_ids(value) else None


def listed(value: object) -> list[object]:
    """Return a setting that may be one value or a list of several as a list."""
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]


def read_config(folder: Path) -> PeftConfig:
    """Read the settings in an adapter's folder. Raises FileError where the folder holds no adapter."""
    put_back(folder)
    if not folder.is_dir():
        raise FileError(f"There is no adapter folder {folder}.")
    missing = [] if (folder / CONFIG).is_file() else [CONFIG]
    if not ((folder / WEIGHTS).is_file() or (folder / PICKLED).is_file()):
        missing.append(WEIGHTS)
    if missing:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))  # PEFT's place for adapters with names
        hint = f" Adapters are in its folders {', '.join(inside)}: give one of these." if inside else ""
        hint = f" Its adapter is in {folder / inside[0]}: give that." if len(inside) == 1 else hint
        raise FileError(f"{folder} is not an adapter folder: {' and '.join(missing)} missing. In it: {there}.{hint}")
    return PeftConfig.of(read_object(folder / CONFIG))


def method_of(folder: Path) -> str | None:
    """Return the method of an adapter folder, as methods/registry.py names it.

    None for LoRA's, and for what LoRA's reader has to refuse. Raises FileError where the folder holds no adapter.
    """
    config = read_config(folder)
    return config.method or _OTHERS.get(config.peft_type or "")


# --- what can be wrong ------------------------------------------------------------------------------------------


def setting_problems(settings: Mapping[str, object]) -> list[str]:
    """List each setting of a LoRA adapter that deltaw would misread, and each that is no sound value."""
    kind = settings.get("peft_type")
    if kind not in SETTINGS["peft_type"][0]:  # whose settings mean other things
        return [f"{CONFIG}: peft_type is {kind!r}: {SETTINGS['peft_type'][1]}"]
    problems = [
        f"{CONFIG}: {key} is {settings[key]!r}: {why}"
        for key, (read, why) in SETTINGS.items()
        if key in settings and settings[key] not in read
    ]
    return problems + unknown_problems(settings, KNOWN) + _number_problems(settings) + _name_problems(settings)


def unknown_problems(settings: Mapping[str, object], known: Collection[str]) -> list[str]:
    """List the flags and groups of settings that are on and not among `known`."""
    return [
        f"{CONFIG}: {key} is {value!r}: this version of deltaw does not know what that changes"
        for key, value in settings.items()
        if key not in known and (value is True or (isinstance(value, (dict, list)) and value))
    ]


def unknown_settings(settings: Mapping[str, object], known: Collection[str]) -> list[str]:
    """List the numbers and texts that are not among `known`, whose effect deltaw does not know."""
    return sorted(
        f"{key} = {value!r}"
        for key, value in settings.items()
        if key not in known and not isinstance(value, (bool, dict, list)) and value not in (None, "")
    )


def _number_problems(settings: Mapping[str, object]) -> list[str]:
    """List what is wrong with the settings that ranks and scales are computed from."""
    problems: list[str] = []
    for key, pattern_key, a_rank in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        values = {key: settings[key]} if key in settings else {}
        if key not in settings:
            problems.append(f"{CONFIG}: {key} is missing, so the scale α/r is unknown")
        patterns = settings.get(pattern_key) or {}
        if not isinstance(patterns, Mapping):
            problems.append(f"{CONFIG}: {pattern_key} is {patterns!r}; it must map names of layers to numbers")
            patterns = {}
        values |= {f"{pattern_key}[{pattern!r}]": value for pattern, value in patterns.items()}
        problems += [
            f"{CONFIG}: {pattern_key} has {pattern!r}, which is no regular expression"
            for pattern in patterns
            if not (is_plain(pattern) or is_pattern(in_pattern(pattern)))
        ]
        problems += [
            f"{CONFIG}: {name} is {value!r}; it must be a {'whole ' if a_rank else ''}number above 0"
            for name, value in values.items()
            if (_whole(value) if a_rank else _positive(value)) is None
        ]
    dropout = _number(settings.get("lora_dropout") or 0.0)
    if dropout is None or not 0 <= dropout < 1:
        problems.append(
            f"{CONFIG}: lora_dropout is {settings['lora_dropout']!r}; it must be a probability, from 0 to below 1"
        )
    if settings.get("use_rslora") not in (True, False, None):
        problems.append(f"{CONFIG}: use_rslora is {settings['use_rslora']!r}; it must be true or false")
    return problems


def _name_problems(settings: Mapping[str, object]) -> list[str]:
    """List what is wrong with the settings that name modules, parameters and tokens."""
    problems = [
        f"{CONFIG}: {key} is {settings[key]!r}; it must be a list of names"
        for key in ("modules_to_save", "target_parameters")
        if not are_names(settings.get(key))
    ]
    tokens = settings.get("trainable_token_indices")
    lists = [*tokens.values()] if isinstance(tokens, Mapping) else [tokens]
    if not all(ids is None or _are_ids(ids) for ids in lists):
        problems.append(f"{CONFIG}: trainable_token_indices is {tokens!r}; it must hold ids of tokens, none twice")
    return problems


def _are_ids(values: object) -> bool:
    """True for a list of tokens' ids, none twice."""
    return isinstance(values, list) and all(map(is_natural, values)) and len(set(values)) == len(values)


def are_names(value: object) -> bool:
    """True for a list of names, and for a setting that is not there."""
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def is_pattern(value: object) -> bool:
    """True for a text that is a regular expression which can be matched."""
    return isinstance(value, str) and problem(value) is None


def in_pattern(pattern: str) -> str:
    """Return the regular expression that PEFT makes of a key of rank_pattern. (Groups in it count from this one's.)"""
    return rf"(.*\.)?({pattern})$"
