"""MODEL and --adapter → a model ready to use, and the prompt settings that the adapter was trained with."""

from __future__ import annotations

import dataclasses
from typing import Any

from deltaw.cli.flags import Opening
from deltaw.config import DataConfig

# Settings that decide what a prompt looks like in tokens: an adapter expects what it was trained on
_PROMPT_KEYS = ("template", "separator", "system")


def open_model(source: str, opening: Opening) -> Any:
    """A `Pretrained` with the adapter attached and active, where one is named."""
    from deltaw import store
    from deltaw.pretrained import load_pretrained

    loaded = load_pretrained(source, dtype=opening.dtype, device=opening.device)
    if opening.adapter is not None:
        store.load(loaded.model, opening.adapter, check_base=not opening.any_base)
    return loaded


def as_trained(data: DataConfig, adapter: str | None) -> DataConfig:
    """`data` with the adapter's own prompt settings where the user gave none."""
    if adapter is None:
        return data
    from deltaw import store

    training, default = store.training_of(adapter), DataConfig()
    mine = {
        key: training[key] for key in _PROMPT_KEYS if key in training and getattr(data, key) == getattr(default, key)
    }
    return dataclasses.replace(data, **mine)
