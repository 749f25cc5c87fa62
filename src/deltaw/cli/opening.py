"""MODEL and --adapter → a model ready to use, and the settings that the adapter was trained with."""

from __future__ import annotations

import dataclasses
from typing import Any

from deltaw.cli.flags import Opening
from deltaw.config import DataConfig


def open_model(source: str, opening: Opening, data: DataConfig | None = None) -> Any:
    """A `Pretrained` with the adapter attached and active, and its tokenizer, where one is named, for the task of `data`, which
    is by default the adapter's."""
    from deltaw import tasks
    from deltaw.pretrained import check_vocabulary

    data = as_trained(DataConfig(), opening.adapter, source) if data is None else data
    loaded = tasks.opened(source, data, dtype=opening.dtype, device=opening.device)
    if opening.adapter is not None:
        return tasks.equip(loaded, opening.adapter, check_base=not opening.any_base)
    check_vocabulary(loaded.model, loaded.tokenizer, loaded.name)
    return loaded


def as_trained(data: DataConfig, adapter: str | None, model: str | None = None) -> DataConfig:
    """`data` with the adapter's own task and prompt settings where the user gave none, and the task of `model` where that has
    only one: a completion, of one with an encoder and a decoder."""
    from deltaw import tasks

    default, own = DataConfig(), tasks.of_adapter(adapter)
    mine = {
        field.name: getattr(own, field.name)
        for field in dataclasses.fields(data)
        if getattr(data, field.name) == getattr(default, field.name)
    }
    data = dataclasses.replace(data, **mine)
    if data.task == "auto" and model is not None:
        from deltaw.pretrained import read_config

        encodes = getattr(read_config(model), "is_encoder_decoder", False)
        data = dataclasses.replace(data, task="seq2seq" if encodes else "causal")
    return data
