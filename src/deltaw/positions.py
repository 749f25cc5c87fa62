"""How much a model takes: positions that a row of tokens must fit in, tokens that it has rows for, the size of an image. Knows a
model's config, and that prefixes take positions."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from deltaw.attached import find_record
from deltaw.config import DataConfig
from deltaw.errors import ConfigError

# Beside transformers' standard name, the names that configs give it
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions")


def most_positions(model: Any) -> int | None:
    """The most tokens that a row may have; None where the model's config sets no bound. An adapter's prefix takes some of them.

    Learned positions end there, with an index error; rotary ones lose their sense.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = (getattr(config, name, None) for name in _NAMES)
    most = next((int(n) for n in found if isinstance(n, int) and n > 0), None)
    return most if most is None else most - _taken_by_padding(model, most) - _taken_by_prefix(model)


def _taken_by_padding(model: Any, most: int) -> int:
    """Positions that RoBERTa and its like never give a token: those up to the padding's own."""
    for name, module in model.named_modules():
        own = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and own is not None and getattr(module, "num_embeddings", 0) == most:
            return int(own) + 1
    return 0


def _taken_by_prefix(model: Any) -> int:
    """By the longest one that is attached: which adapter a row will go through is not known here."""
    record = find_record(model) if isinstance(model, nn.Module) else None
    return max((getattr(a.method, "positions", 0) for a in record.attached.values()), default=0) if record else 0


def within(data: DataConfig, model: Any, taken: int = 0) -> DataConfig:
    """`data` with a max_length that the model has positions for, besides `taken` ones. Raises ConfigError where these are all."""
    most = most_positions(model)
    if most is not None and most <= taken:
        raise ConfigError(f"The prefix takes {taken} positions, and the model has {most}: make it shorter.")
    return data if most is None else dataclasses.replace(data, max_length=min(data.max_length, most - taken))


def vocabulary_size(model: Any) -> int | None:
    """Rows of the model's embedding of tokens; None where it has no such table."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # transformers' way to say that there is none
        return None
    return getattr(embedding, "num_embeddings", None)


def image_shape(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a vision model takes."""
    size = model.config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return getattr(model.config, "num_channels", 3), height, width
