"""Open a model for a task, or with an adapter's file: its head, labels and tokenizer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from deltaw.config import DataConfig, DType, Task
from deltaw.data import Records, check_unwrapped, template_of, usual_separator
from deltaw.errors import DataError, FileError, shown
from deltaw.files import store
from deltaw.files.formats.method_file import MethodFile
from deltaw.files.formats.model_folder import brought
from deltaw.files.formats.peft import LoRAFile
from deltaw.model.inputs import image_shape, most_positions, tokens_beyond, within
from deltaw.model.pretrained import Pretrained, check_vocabulary, load_pretrained, resize_vocabulary
from deltaw.model.summary import updates
from deltaw.progress import say
from deltaw.training.tasks import Image, Seq2Seq, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("deltaw")

# Settings that an adapter needs as they were in its training
_KEPT = ("template", "separator", "system", "task", "labels")


def of_adapter(folder: str | Path | None) -> DataConfig:
    """Return the settings that an adapter was trained with: its task, its classes, how a prompt looks in tokens.

    Settings that its file does not name, and all for None, are the defaults.
    """
    if folder is None:
        return DataConfig()
    training = store.training_of(folder)
    data = DataConfig(**{key: training[key] for key in _KEPT if training.get(key) is not None})
    return data if "task" in training else _of_foreign(data, store.read(Path(folder)))


def _of_foreign(data: DataConfig, file: LoRAFile | MethodFile) -> DataConfig:
    """Return the settings with the task of an adapter that others wrote.

    A classifier's file (PEFT's SEQ_CLS) does not name its classes; the outputs of the head in it give their number.
    """
    config, whole = file.config, file.whole if isinstance(file, LoRAFile) else {}
    if config.task_type == "SEQ_2_SEQ_LM":
        return dataclasses.replace(data, task="seq2seq")
    heads = [len(t) for name, t in whole.items() if name.endswith("weight") and t.ndim == 2]
    if config.task_type != "SEQ_CLS" or not heads:
        return data
    outputs = min(heads)
    if outputs == 1:
        return dataclasses.replace(data, task="regression")
    return dataclasses.replace(data, task="classification", labels=[f"LABEL_{i}" for i in range(outputs)])


def opened(
    source: str,
    data: DataConfig,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    to_train: bool = False,
    trust_remote_code: bool = False,
) -> Pretrained:
    """Return `load_pretrained` for the task of these settings. Raises as that does."""
    say("loading the model")
    task = cast(Task, task_of(data).name)
    with _quietly():
        return load_pretrained(
            source,
            task=task,
            labels=data.labels,
            dtype=dtype,
            device=device,
            to_train=to_train,
            trust_remote_code=trust_remote_code,
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers' bars and notices back, while open: they would run through a view, or print where none is wanted.

    Of weights that are missing we tell ourselves.
    """
    from transformers.utils import logging as notices

    verbosity, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    # torchao warns of kernels that it cannot load, and torch of torchao's classes
    others = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in others]
    notices.set_verbosity(max(verbosity, notices.ERROR))
    notices.disable_progress_bar()
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        notices.set_verbosity(verbosity)
        if bars:
            notices.enable_progress_bar()
        for logger, level in zip(others, levels, strict=True):
            logger.setLevel(level)


def equip(loaded: Pretrained, adapter: str | Path, *, check_base: bool = True, resize: bool = False) -> Pretrained:
    """Put an adapter on a model that may lack a head, and take the tokenizer and chat template of its folder.

    The adapter's tokenizer and template are taken where they differ from the base's. With `resize`, the model first gets as many
    tokens as the adapter and its tokenizer have.

    Raises FileError where neither model nor adapter has the head (its answers would be random) and for a tokenizer that cannot be
    opened; BaseMismatch for an adapter of another base; ConfigError, without `resize`, for tokens without rows.
    """
    model, folder, tokenizer = loaded.model, Path(adapter), None
    file = store.named_for(model, store.read(folder))
    if hasattr(loaded.tokenizer, "get_vocab"):  # an image processor has no tokens
        tokenizer = brought(
            folder,
            loaded.tokenizer,
            config=model.config,
            check=check_base,
            trust_remote_code=loaded.trust_remote_code,
        )
        rows, used = store.tokens_with(model, file), loaded.tokenizer if tokenizer is None else tokenizer
        if resize:
            resize_vocabulary(model, rows if tokenizer is None else _with_new(used, rows, folder))
        else:
            check_vocabulary(model, used, loaded.name if tokenizer is None else str(folder), rows)
    placed = updates(model, store.place(model, file, folder, check_base=check_base))
    lacking = [n for n in loaded.untrained if n not in placed or not placed[n].covers(model.get_submodule(n))]
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


def _with_new(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path) -> int:
    """Return how many rows an embedding needs for the adapter's and its tokenizer's tokens.

    Warn of tokens that neither the adapter nor the base has a row for.
    """
    if not (lacking := tokens_beyond(tokenizer, rows)):
        return rows
    log.warning(
        "The tokenizer in %s has tokens up to %d, the model's embedding %d rows with the adapter: %s get the mean of all others.",
        folder, max(lacking.values()), rows, shown(list(lacking), 5),
    )  # fmt: skip
    return max(lacking.values()) + 1


@torch.no_grad()
def probe(loaded: Pretrained, data: DataConfig) -> dict[str, Tensor]:
    """Return one row of inputs to compare models on.

    It is some text, then seeded random tokens, as far as positions go; for an image model, noise.
    """
    model, chance = loaded.model, torch.Generator().manual_seed(0)
    if isinstance(task_of(data), Image):
        noise = torch.randn(1, *image_shape(model), generator=chance)
        return {"pixel_values": noise.to(model.device, model.dtype)}
    text = loaded.tokenizer("The weights of this model were updated by a product of two thin matrices.").input_ids
    walk = torch.randint(0, model.config.get_text_config().vocab_size, (64,), generator=chance).tolist()
    ids = torch.tensor([[*text, *walk][: most_positions(model)]], device=model.device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :16]} if isinstance(task_of(data), Seq2Seq) else {})


def prepared(data: DataConfig, records: Records, loaded: Pretrained, taken: int = 0) -> DataConfig:
    """Return `data` with `auto` resolved for these records, within the model's positions without `taken` ones."""
    if data.task == "causal":
        template = template_of(records.form, loaded.tokenizer, data)
        if data.template == "auto" and template == "chat":
            check_unwrapped(records, loaded.tokenizer)
        data = dataclasses.replace(data, template=template)  # type: ignore[arg-type]
        if template == "plain" and data.separator is None:
            data = dataclasses.replace(data, separator=usual_separator(records.items))
    else:
        _check_prompt_settings(data)
    return within(data, loaded.model, taken)


def _check_prompt_settings(data: DataConfig) -> None:
    """Raise DataError for settings of prompts that a task other than causal does not use."""
    unused = ["system"] * (data.system is not None) + ["template: chat"] * (data.template == "chat")
    unused += ["separator"] * bool(data.separator and data.task != "seq2seq")
    if unused:
        raise DataError(f"Settings have no effect in task {data.task}: {', '.join(unused)}. Leave them out.")
