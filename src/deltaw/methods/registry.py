"""The methods by the names that the command line and files have for them. Imports no torch."""

from __future__ import annotations

from typing import Any

from deltaw.errors import ConfigError, nearest
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
