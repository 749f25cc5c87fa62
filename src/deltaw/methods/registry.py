"""The methods by the names that the command line, files and comparisons have for them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from deltaw.config import from_mapping
from deltaw.errors import ConfigError, DeltaWError, nearest
from deltaw.methods.bitfit import BitFit
from deltaw.methods.bottleneck import Bottleneck
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.ia3 import IA3
from deltaw.methods.lora import LoRA
from deltaw.methods.prefix import Prefix

METHODS: dict[str, type[Any]] = {
    "lora": LoRA, "dora": DoRA, "bitfit": BitFit, "bottleneck": Bottleneck, "prefix": Prefix, "ia3": IA3, "full": Full,
}  # fmt: skip


def method_class(name: str) -> type[Any]:
    """Raises ConfigError for a name that there is not."""
    if name not in METHODS:
        raise ConfigError(f"There is no method {name!r}{nearest(name, METHODS)}. Methods: {', '.join(METHODS)}.")
    return METHODS[name]


def name_of(method: Any) -> str | None:
    """A method's name; None for one that is not ours."""
    return next((name for name, cls in METHODS.items() if type(method) is cls), None)


# Name → method, its settings, its usual learning rate: between the best ones of SmolLM2-135M on E2E and of MiniLM on CoLA
# (docs/evidence.md). The fewer parameters, the higher; a model of billions wants less, hence --lrs
_KNOWN: dict[str, tuple[str, dict[str, Any], float]] = {
    "full": ("full", {}, 1e-4),
    "bitfit": ("bitfit", {}, 4e-3),
    "houlsby": ("bottleneck", {"kind": "houlsby", "size": 32, "norms": True}, 1e-3),
    "pfeiffer": ("bottleneck", {"kind": "pfeiffer", "size": 64}, 2e-3),
    "lin": ("bottleneck", {"kind": "lin", "size": 64}, 2e-3),
    "adapterdrop": ("bottleneck", {"kind": "houlsby", "size": 32, "drop": 5}, 1e-3),
    "prefix": ("prefix", {"where": "layers"}, 1e-2),
    "prompt": ("prefix", {"where": "embedding"}, 1e-2),
    "ia3": ("ia3", {}, 2e-2),
    "lora-qv": ("lora", {"targets": "qv"}, 3e-3),
    "lora": ("lora", {}, 1.5e-3),
    "dora": ("dora", {}, 1.5e-3),
}
DEFAULT = "full,bitfit,houlsby,pfeiffer,prefix,ia3,lora-qv,lora,dora"
QUICK = "full,bitfit,houlsby,lora-qv,lora"
_ENTRY = re.compile(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*")


@dataclass(frozen=True)
class Contestant:
    """A method with its settings in a comparison."""

    name: str
    """As it was written."""
    method: Any
    lr: float
    """Its usual learning rate."""

    @property
    def kind(self) -> str:
        """The method's name in the registry."""
        name = name_of(self.method)
        assert name is not None
        return name


def contestants(text: str) -> list[Contestant]:
    """From "full,lora,lora(rank=64),bottleneck(size=16,kind=lin,lr=1e-3)": names of this file or of methods, in brackets
    settings in place of theirs. Raises ConfigError with everything wrong."""
    found: dict[str, Contestant] = {}
    problems: list[str] = []
    for entry in re.split(r",(?![^(]*\))", text):
        if not entry.strip():
            continue
        try:
            made = _contestant(entry.strip())
        except DeltaWError as error:
            problems += error.problems
            continue
        if made.name in found:
            problems.append(f"{made.name!r} is there twice")
        found[made.name] = made
    if not found and not problems:
        problems.append("there is none")
    if problems:
        raise ConfigError("These methods cannot be compared:", problems)
    return list(found.values())


def _contestant(entry: str) -> Contestant:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ConfigError(f"{entry!r} is no method; write a name, or a name(setting=value,…)")
    name, given = match[1], _settings(entry, match[2] or "")
    if name not in _KNOWN and name not in METHODS:
        raise ConfigError(
            f"there is no method {name!r}{nearest(name, {**_KNOWN, **METHODS})}; there are {', '.join(_KNOWN)}"
        )
    method, settings, lr = _KNOWN.get(name) or _of_method(name)
    lr = float(given.pop("lr", lr))
    known = {f.name for f in fields(METHODS[method])}
    unknown = [f"{entry}: unknown setting {k!r}{nearest(k, known)}" for k in given if k not in known]
    if unknown:
        raise ConfigError("", unknown)
    return Contestant(entry, from_mapping(METHODS[method], {**settings, **given}, where=entry), lr)


def _of_method(name: str) -> tuple[str, dict[str, Any], float]:
    """A method's usual rate, with its own defaults."""
    lr = next(lr for method, _, lr in _KNOWN.values() if method == name)
    return name, {}, lr


def _settings(entry: str, text: str) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = {}
    for word in filter(None, (w.strip() for w in re.split(r"[,;]", text))):
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{entry}: {word!r} is no setting; write key=value")
        found[key.strip()] = yaml.safe_load(value)
    return found


def rates(lr: float, count: int) -> list[float]:
    """`count` learning rates a factor of three apart around a usual one."""
    return [lr * 3.0 ** (i - (count - 1) // 2) for i in range(count)]


def described(method: Any) -> Mapping[str, Any]:
    """A method's settings that are not its defaults."""
    plain = type(method)()
    return {f.name: v for f in fields(method) if (v := getattr(method, f.name)) != getattr(plain, f.name)}
