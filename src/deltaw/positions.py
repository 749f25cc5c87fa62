"""How much a model takes: the positions that a row of tokens must fit in, the size of an image. Knows a model's config alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from deltaw.config import DataConfig

# Beside transformers' standard name, the names that configs give it
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions")


def most_positions(model: Any) -> int | None:
    """The most tokens that a row may have; None where the model's config sets no bound.

    Learned positions end there, with an index error; rotary ones lose their sense.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = (getattr(config, name, None) for name in _NAMES)
    most = next((int(n) for n in found if isinstance(n, int) and n > 0), None)
    return most if most is None else most - _taken_by_padding(model, most)


def _taken_by_padding(model: Any, most: int) -> int:
    """Positions that RoBERTa and its like never give a token: those up to the padding's own."""
    for name, module in model.named_modules():
        own = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and own is not None and getattr(module, "num_embeddings", 0) == most:
            return int(own) + 1
    return 0


def within(data: DataConfig, model: Any) -> DataConfig:
    """`data` with a max_length that the model has positions for."""
    return dataclasses.replace(data, max_length=min(data.max_length, most_positions(model) or data.max_length))


def image_shape(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a vision model takes."""
    size = model.config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return getattr(model.config, "num_channels", 3), height, width
