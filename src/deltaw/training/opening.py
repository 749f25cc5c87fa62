"""Open a model for a task or with the adapter that a file holds: its head, its labels, its tokenizer."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.config import DataConfig, DType
from deltaw.data import template_of
from deltaw.errors import DataError, FileError
from deltaw.files import store
from deltaw.files.formats.model_folder import brought
from deltaw.model.inputs import image_shape, most_positions, within
from deltaw.model.pretrained import Pretrained, check_vocabulary, load_pretrained, resize_vocabulary
from deltaw.model.summary import updates
from deltaw.training.tasks import _KEPT, Image, Seq2Seq, _with_new, task_of


def of_adapter(folder: str | Path | None) -> DataConfig:
    """The settings that an adapter was trained with: its task, its classes, how a prompt looks in tokens; the default ones of
    None, and for what its file does not say."""
    if folder is None:
        return DataConfig()
    training = store.training_of(folder)
    data = DataConfig(**{key: training[key] for key in _KEPT if training.get(key) is not None})
    return data if "task" in training else _of_foreign(data, store.read(Path(folder)))


def _of_foreign(data: DataConfig, file: Any) -> DataConfig:
    """With the task of an adapter that others wrote. Of a classifier's (PEFT's SEQ_CLS) classes only the number is known, by
    the outputs of the head in the file."""
    if file.config.task_type == "SEQ_2_SEQ_LM":
        return dataclasses.replace(data, task="seq2seq")
    heads = [len(t) for name, t in getattr(file, "whole", {}).items() if name.endswith("weight") and t.ndim == 2]
    if file.config.task_type != "SEQ_CLS" or not heads:
        return data
    outputs = min(heads)
    if outputs == 1:
        return dataclasses.replace(data, task="regression")
    return dataclasses.replace(data, task="classification", labels=[f"LABEL_{i}" for i in range(outputs)])


def opened(
    source: str, data: DataConfig, *, dtype: DType = "auto", device: str = "auto", to_train: bool = False
) -> Pretrained:
    """`load_pretrained` for the task that settings say."""
    name: Any = task_of(data).name
    return load_pretrained(source, task=name, labels=data.labels, dtype=dtype, device=device, to_train=to_train)


def equip(loaded: Pretrained, adapter: str | Path, *, check_base: bool = True, resize: bool = False) -> Pretrained:
    """`store.load`, for a model that may lack a head, and the tokenizer and chat template in the adapter's folder, where these
    are others than the base's. With `resize` the model first gets as many tokens as the adapter and its tokenizer have.

    Raises FileError where the adapter has no head for the model either (what it says would be random), and for a tokenizer that
    cannot be opened; BaseMismatch for one of another base; without `resize` ConfigError for one with tokens that there are no
    rows for."""
    model, folder, tokenizer = loaded.model, Path(adapter), None
    file = store.named_for(model, store.read(folder))
    if hasattr(loaded.tokenizer, "get_vocab"):  # an image processor has no tokens
        tokenizer = brought(folder, loaded.tokenizer, config=model.config, check=check_base)
        rows, used = store.tokens_with(model, file), loaded.tokenizer if tokenizer is None else tokenizer
        if resize:
            resize_vocabulary(model, rows if tokenizer is None else _with_new(used, rows, folder))
        else:
            check_vocabulary(model, used, loaded.name if tokenizer is None else str(folder), rows)
    own = updates(model, store.place(model, file, folder, check_base=check_base))
    lacking = [n for n in loaded.untrained if n not in own or not own[n].covers(model.get_submodule(n))]
    if lacking:
        raise FileError(
            f"{loaded.name} lacks the weights of some layers, and the adapter in {adapter} has none for them:",
            lacking,
            "Their values would be random. Was the adapter trained on another checkpoint, one with these layers?",
        )
    if tokenizer is None:
        return loaded
    base = loaded.tokenizer
    if tokenizer.chat_template and not base.chat_template:
        base = copy.deepcopy(base)
        base.chat_template = tokenizer.chat_template
    return dataclasses.replace(loaded, tokenizer=tokenizer, base_tokenizer=base)


@torch.no_grad()
def probe(loaded: Pretrained, data: DataConfig) -> dict[str, Tensor]:
    """One row of inputs to compare models on: some text, then a seeded walk through the vocabulary, as far as positions go;
    noise in place of an image."""
    model, chance = loaded.model, torch.Generator().manual_seed(0)
    if task_of(data) is Image:
        noise = torch.randn(1, *image_shape(model), generator=chance)
        return {"pixel_values": noise.to(model.device, model.dtype)}
    text = loaded.tokenizer("The weights of this model were updated by a product of two thin matrices.").input_ids
    walk = torch.randint(0, model.config.get_text_config().vocab_size, (64,), generator=chance).tolist()
    ids = torch.tensor([[*text, *walk][: most_positions(model)]], device=model.device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :16]} if task_of(data) is Seq2Seq else {})


def prepared(data: DataConfig, form: str, loaded: Pretrained, taken: int = 0) -> DataConfig:
    """`data` with what `auto` comes to for records of this form, within the model's positions, but for `taken` ones."""
    if data.task == "causal":
        data = dataclasses.replace(data, template=template_of(form, loaded.tokenizer, data))  # type: ignore[arg-type]
    else:
        _check_prompt_settings(data)
    return within(data, loaded.model, taken)


def _check_prompt_settings(data: DataConfig) -> None:
    """Raise DataError for settings of prompts that a task other than causal does not use."""
    unused = ["system"] * (data.system is not None) + ["template: chat"] * (data.template == "chat")
    unused += ["separator"] * bool(data.separator and data.task != "seq2seq")
    if unused:
        raise DataError(f"Settings have no effect in task {data.task}: {', '.join(unused)}. Leave them out.")
