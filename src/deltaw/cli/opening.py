"""MODEL and --adapter → a model ready to use, and the settings of the adapter's training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Opening
from deltaw.config import DataConfig

if TYPE_CHECKING:
    from deltaw.data import Record
    from deltaw.model.pretrained import Pretrained

NO_END = "The chat template ends turns in no token to stop at: replies may run on to --max-new-tokens."


def open_model(source: str, opening: Opening, data: DataConfig | None = None) -> Pretrained:
    """Open the model for the task of `data`, by default the adapter's.

    An adapter is attached and active, with its tokenizer. Raises FileError, AdapterError or BaseMismatch.
    """
    from deltaw.model.pretrained import check_vocabulary
    from deltaw.training.opening import equip, opened

    data = (
        as_trained(DataConfig(), opening.adapter, source, trust_remote_code=opening.trust_remote_code)
        if data is None
        else data
    )
    loaded = opened(
        source,
        data,
        dtype=opening.dtype,
        device=opening.device,
        trust_remote_code=opening.trust_remote_code,
    )
    if opening.adapter is not None:
        return equip(loaded, opening.adapter, check_base=not opening.any_base)
    check_vocabulary(loaded.model, loaded.tokenizer, loaded.name)
    return loaded


def as_trained(
    data: DataConfig, adapter: str | None, model: str | None = None, *, trust_remote_code: bool = False
) -> DataConfig:
    """Return `data` with the task and prompt settings of the adapter's training where the user gave none.

    Without an adapter's task, a `model` with an encoder and a decoder has seq2seq, and any other causal.
    """
    from deltaw.training.opening import of_adapter

    default, trained = DataConfig(), of_adapter(adapter)
    missing = {
        field.name: getattr(trained, field.name)
        for field in dataclasses.fields(data)
        if getattr(data, field.name) == getattr(default, field.name)
    }
    data = dataclasses.replace(data, **missing)
    if data.task == "auto" and model is not None:
        from deltaw.model.pretrained import read_config

        config = read_config(model, trust_remote_code=trust_remote_code)
        encodes = getattr(config, "is_encoder_decoder", False)
        data = dataclasses.replace(data, task="seq2seq" if encodes else "causal")
    return data


def warn_of_no_end(loaded: Pretrained, records: Iterable[Record], data: DataConfig) -> None:
    """Warn if the chat template for these records ends its turns in plain text, not in a token."""
    from deltaw.data import template_of, turn_ends
    from deltaw.training.tasks import Causal, task_of

    if not isinstance(task_of(data), Causal):
        return
    chats = any(template_of(form, loaded.tokenizer, data) == "chat" for form in {record.form for record in records})
    if chats and not turn_ends(loaded.tokenizer):
        show.prose(f"warning: {NO_END}", style="yellow", console=show.err)
