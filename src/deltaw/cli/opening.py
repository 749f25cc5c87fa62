"""MODEL and --adapter → a model ready to use, and the settings that the adapter was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from deltaw.cli import show
from deltaw.cli.flags import Opening
from deltaw.config import DataConfig

NO_END = "The chat template ends turns in no token to stop at: replies may run on to --max-new-tokens."


def open_model(source: str, opening: Opening, data: DataConfig | None = None) -> Any:
    """A `Pretrained` with the adapter attached and active, and its tokenizer, where one is named, for the task of `data`, which
    is by default the adapter's."""
    from deltaw.model.pretrained import check_vocabulary
    from deltaw.training.opening import equip, opened

    data = as_trained(DataConfig(), opening.adapter, source) if data is None else data
    loaded = opened(source, data, dtype=opening.dtype, device=opening.device)
    if opening.adapter is not None:
        return equip(loaded, opening.adapter, check_base=not opening.any_base)
    check_vocabulary(loaded.model, loaded.tokenizer, loaded.name)
    return loaded


def as_trained(data: DataConfig, adapter: str | None, model: str | None = None) -> DataConfig:
    """`data` with the adapter's own task and prompt settings where the user gave none, and the task of `model` where that has
    only one: a completion, of one with an encoder and a decoder."""
    from deltaw.training.opening import of_adapter

    default, own = DataConfig(), of_adapter(adapter)
    mine = {
        field.name: getattr(own, field.name)
        for field in dataclasses.fields(data)
        if getattr(data, field.name) == getattr(default, field.name)
    }
    data = dataclasses.replace(data, **mine)
    if data.task == "auto" and model is not None:
        from deltaw.model.pretrained import read_config

        encodes = getattr(read_config(model), "is_encoder_decoder", False)
        data = dataclasses.replace(data, task="seq2seq" if encodes else "causal")
    return data


def warn_of_no_end(loaded: Any, records: Iterable[Any], data: Any) -> None:
    """Say where the chat template that these records' prompts go through ends its turns in plain text."""
    from deltaw.data import template_of, turn_ends
    from deltaw.training.tasks import Causal, task_of

    if not isinstance(task_of(data), Causal):
        return
    chats = any(template_of(form, loaded.tokenizer, data) == "chat" for form in {record.form for record in records})
    if chats and not turn_ends(loaded.tokenizer):
        show.prose(f"warning: {NO_END}", style="yellow", console=show.err)
