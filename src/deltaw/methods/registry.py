"""The methods by their names, and what a comparison is asked to compare. Imports no torch.

The methods are imported here, and each of them registers itself (`plan.register`). A new one is one more import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from deltaw.config import from_mapping
from deltaw.errors import ConfigError, DeltaWError, nearest

# Help and messages list the methods in this order
# isort: off
from deltaw.methods import lora, dora, bitfit, bottleneck, prefix, ia3, full  # noqa: F401

# isort: on
from deltaw.methods.plan import METHODS as METHODS
from deltaw.methods.plan import PRESETS as PRESETS
from deltaw.methods.plan import Method

DEFAULT = "full,bitfit,houlsby,pfeiffer,prefix,ia3,lora-qv,lora,dora"
"""Contestants of `compare` and `plan` where no others are asked for."""
QUICK = "full,bitfit,houlsby,lora-qv,lora"
"""Contestants of `compare --quick`."""


def method_class(name: str) -> type[Method]:
    """Return the method of this name. Raises ConfigError for a name that no method has."""
    if name not in METHODS:
        raise ConfigError(f"There is no method {name!r}{nearest(name, METHODS)}. Methods: {', '.join(METHODS)}.")
    return METHODS[name]


def name_of(method: Method) -> str | None:
    """Return a method's name; None for one that is not registered."""
    return next((name for name, cls in METHODS.items() if type(method) is cls), None)


# The usual rates were measured at widths of 384 and 576 (results/compare_*.json, results/rates_e2e.json). Wider models take lower
# ones: the exponent is the one that Schulman et al. 2025 ("LoRA Without Regret", Thinking Machines Lab) fitted to Llama models
_MEASURED_WIDTH, _EXPONENT = 576, 0.78


def at_width(lr: float, width: int | None) -> float:
    """Return a usual learning rate for a model of this hidden size, to two significant digits. None: of an unknown one."""
    factor = min(1.0, (_MEASURED_WIDTH / width) ** _EXPONENT) if width else 1.0
    return float(f"{lr * factor:.2g}")


def usual_lr(method: Method, width: int | None) -> float:
    """Return the usual peak learning rate of a method's settings on a model of this hidden size.

    It is the rate of the preset with the most of these settings. Raises ConfigError for a method that is not registered.
    """
    kind = name_of(method)
    fitting = [
        preset
        for of_kind, preset in PRESETS.values()
        if of_kind == kind and all(_has(method, name, value) for name, value in preset.settings.items())
    ]
    if not fitting:
        raise ConfigError(f"{type(method).__name__} has no usual learning rate: set lr.")
    return at_width(max(fitting, key=lambda preset: len(preset.settings)).lr, width)


def _has(method: Method, name: str, value: object) -> bool:
    """Return whether a setting of the method is this value; q,v and qv are one."""
    actual = getattr(method, name)
    return bool(actual == value or (value == "qv" and actual in ("q,v", "v,q", ["q", "v"], ["v", "q"])))


@dataclass(frozen=True)
class Contestant:
    """A method with its settings in a comparison."""

    name: str
    """The entry as it was written."""
    kind: str
    """The method's name in the registry."""
    method: Method
    lr: float
    """Its usual peak learning rate."""


def contestants(text: str, width: int | None = None) -> list[Contestant]:
    """Return what a text like "full,lora(rank=64),bottleneck(size=16;kind=lin;lr=1e-3)" asks to compare, in its order.

    width: the model's hidden size, which the usual learning rates follow.

    An entry is the name of a method or preset. In brackets stand settings in place of its own, with commas or semicolons.
    Raises ConfigError with everything wrong.
    """
    asked: dict[str, Contestant] = {}
    problems: list[str] = []
    for entry in _entries(text):
        try:
            contestant = _contestant(entry, width)
        except DeltaWError as error:
            problems += error.problems
            continue
        if contestant.name in asked:
            problems.append(f"{contestant.name!r} is there twice")
        asked[contestant.name] = contestant
    if not asked and not problems:
        problems.append("there is none")
    if problems:
        raise ConfigError("These methods cannot be compared:", problems)
    return list(asked.values())


def _entries(text: str) -> list[str]:
    """Return the parts of a text between commas that are outside of brackets, without the empty ones."""
    entries, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth <= 0:
            entries.append("")
        else:
            entries[-1] += character
    return [entry.strip() for entry in entries if entry.strip()]


def _contestant(entry: str, width: int | None) -> Contestant:
    """Return what one entry means. Raises ConfigError with everything wrong with it."""
    name, bracket, rest = entry.partition("(")
    name = name.strip()
    if not name.replace("-", "").isidentifier() or (bracket and not rest.endswith(")")):
        raise ConfigError(f"{entry!r} is no method; write a name, or a name(setting=value,…)")
    if name not in PRESETS:
        raise ConfigError(f"there is no method {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    kind, preset = PRESETS[name]
    asked = _settings(entry, rest.removesuffix(")"))
    lr = _rate(entry, asked.pop("lr", at_width(preset.lr, width)))
    known = {f.name for f in fields(METHODS[kind])}
    if unknown := [f"{entry}: unknown setting {k!r}{nearest(k, known)}" for k in asked if k not in known]:
        raise ConfigError("", unknown)
    return Contestant(entry, kind, from_mapping(METHODS[kind], {**preset.settings, **asked}, where=entry), lr)


def _rate(entry: str, value: object) -> float:
    """Return a learning rate as it was written (YAML reads 1e-3 as text). Raises ConfigError unless it is a number above 0."""
    try:
        rate = float(str(value))
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ConfigError(f"{entry}: lr is {value!r}; it must be a number above 0")
    return rate


def _settings(entry: str, text: str) -> dict[str, object]:
    """Return the settings of an entry's brackets, each value read as YAML. Raises ConfigError for a word that is no setting."""
    import yaml

    settings: dict[str, object] = {}
    for word in filter(None, map(str.strip, text.replace(";", ",").split(","))):
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{entry}: {word!r} is no setting; write key=value")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:  # a pattern, as *q_proj
            settings[key.strip()] = value.strip()
    return settings


def rates(lr: float, count: int) -> list[float]:
    """Return `count` learning rates, each three times the one before, around a usual one."""
    return [lr * 3.0 ** (i - (count - 1) // 2) for i in range(count)]


def described(method: Method) -> Mapping[str, object]:
    """Return a method's settings that are not its defaults: field → value."""
    default = type(method)()
    return {f.name: v for f in fields(method) if (v := getattr(method, f.name)) != getattr(default, f.name)}
