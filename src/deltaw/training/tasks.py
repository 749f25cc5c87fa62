"""What is learned: the next token, a class or a quantity for a text, a completion for an encoder, a class for an image. Each task
says how records become examples, what its loss is, and what a model answers. To add one: subclass `Task`, list it in `TASKS`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deltaw.config import DataConfig, GenerateConfig
from deltaw.data import Encoded, Record, Records, encode, encode_prompt, prompt_ends
from deltaw.data.images import pixels
from deltaw.data.items import Item, encode_images, encode_labelled, encode_seq2seq, encoder_inputs, texts
from deltaw.data.labels import are_quantities, class_indices, class_name, class_names, quantities
from deltaw.errors import DataError
from deltaw.layers.tree import evaluating
from deltaw.model.generate import generate, too_long
from deltaw.model.inputs import check_ends, row_padding, tokens_beyond
from deltaw.model.pretrained import Pretrained, pad_id
from deltaw.training.losses import ClassLoss, CompletionLoss, DecoderLoss, Loss, RecordLoss, SquaredLoss

log = logging.getLogger("deltaw")

# Settings that an adapter expects as they were in its training
_KEPT = ("template", "separator", "system", "task", "labels")

Told = Callable[[int], None]
"""Told how many records are done."""


class Task:
    """A task's answers to what a run, an evaluation or a comparison asks. Classes of this are used as they are."""

    name: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]
    """Forms of the records that it learns from."""
    unit: ClassVar[str] = "nats per supervised token"
    """What its loss is in."""
    counted: ClassVar[str] = "tokens"
    """What its speed is of."""
    answers: ClassVar[Literal["text", "class", "number"]] = "text"

    @classmethod
    def encode(cls, records: Records, loaded: Pretrained, data: DataConfig) -> Encoded:
        """Every record as an example. Raises one DataError with all that cannot be."""
        raise NotImplementedError

    @classmethod
    def loss(cls, loaded: Pretrained) -> Loss:
        """The loss of the model as it is."""
        raise NotImplementedError

    @classmethod
    def answer(
        cls, loaded: Pretrained, records: Sequence[Record], data: DataConfig, generation: GenerateConfig, told: Told
    ) -> list[Any]:
        """What the model says to each record: a text, a class's number, or a quantity."""
        raise NotImplementedError

    @classmethod
    def wanted(cls, record: Record, data: DataConfig) -> Any:
        """What it should say; of a class its name."""
        return record.completion

    @classmethod
    def said(cls, answer: Any, data: DataConfig) -> str:
        """An answer as people read it."""
        if cls.answers == "class":
            return (data.labels or [])[answer]
        return f"{answer:.4g}" if cls.answers == "number" else str(answer)

    @classmethod
    def fits(cls, loaded: Pretrained, record: Record, data: DataConfig, generation: GenerateConfig) -> bool:
        """Whether the model can answer this record."""
        return True


class Causal(Task):
    """The next token of a text, given those before it."""

    name = "causal"
    forms = ("prompt", "chat", "instruction", "text")

    @classmethod
    def encode(cls, records: Records, loaded: Pretrained, data: DataConfig) -> Encoded:
        return encode(records, loaded.tokenizer, data)

    @classmethod
    def loss(cls, loaded: Pretrained) -> Loss:
        return CompletionLoss(loaded.model, pad_id(loaded.tokenizer))

    @classmethod
    def answer(
        cls, loaded: Pretrained, records: Sequence[Record], data: DataConfig, generation: GenerateConfig, told: Told
    ) -> list[Any]:
        prompts = [encode_prompt(record, loaded.tokenizer, data) for record in records]
        ends = prompt_ends(records, loaded.tokenizer, data)
        return list(generate(loaded.model, loaded.tokenizer, prompts, generation, ends=ends, on_done=told))

    @classmethod
    def fits(cls, loaded: Pretrained, record: Record, data: DataConfig, generation: GenerateConfig) -> bool:
        prompt = encode_prompt(record, loaded.tokenizer, data)
        return too_long([prompt], generation, loaded.model) is None


class Seq2Seq(Task):
    """A completion, given its prompt, by a model with an encoder and a decoder (T5, BART)."""

    name = "seq2seq"
    forms = ("prompt", "instruction")

    @classmethod
    def encode(cls, records: Records, loaded: Pretrained, data: DataConfig) -> Encoded:
        return encode_seq2seq(records, loaded.tokenizer, data)

    @classmethod
    def loss(cls, loaded: Pretrained) -> Loss:
        return DecoderLoss(loaded.model, pad_id(loaded.tokenizer))

    @classmethod
    def answer(
        cls, loaded: Pretrained, records: Sequence[Record], data: DataConfig, generation: GenerateConfig, told: Told
    ) -> list[Any]:
        prompts = encoder_inputs(records, loaded.tokenizer, data)
        return list(generate(loaded.model, loaded.tokenizer, prompts, generation, on_done=told))

    @classmethod
    def fits(cls, loaded: Pretrained, record: Record, data: DataConfig, generation: GenerateConfig) -> bool:
        prompts = encoder_inputs([record], loaded.tokenizer, data)
        return too_long(prompts, generation, loaded.model) is None


class Classification(Task):
    """A class of a text, or of a pair of texts."""

    name = "classification"
    forms = ("labelled",)
    unit = "nats per record"
    answers: ClassVar[Literal["text", "class", "number"]] = "class"

    @classmethod
    def encode(cls, records: Records, loaded: Pretrained, data: DataConfig) -> Encoded:
        encoded = encode_labelled(records, loaded.tokenizer, data)
        check_ends(loaded.model, [e.inputs["input_ids"] for e in encoded.examples], [e.place for e in encoded.examples])
        return encoded

    @classmethod
    def loss(cls, loaded: Pretrained) -> RecordLoss:
        return ClassLoss(loaded.model, row_padding(loaded.model, pad_id(loaded.tokenizer)))

    @classmethod
    def answer(
        cls, loaded: Pretrained, records: Sequence[Record], data: DataConfig, generation: GenerateConfig, told: Told
    ) -> list[Any]:
        items = [Item(each, 0, "") for each in cls._inputs(loaded, records, data)]
        return cls.answers_of(cls.logits(loaded, items, generation.batch, told))

    @classmethod
    def answers_of(cls, logits: Tensor) -> list[Any]:
        """What logits [n, outputs] say."""
        return [int(i) for i in logits.argmax(-1)]

    @classmethod
    @torch.no_grad()
    def logits(cls, loaded: Pretrained, items: Sequence[Item], batch: int, told: Told) -> Tensor:
        """Of each item, fp32 [n, outputs] on the CPU."""
        order = sorted(range(len(items)), key=lambda i: items[i].length)
        loss = cls.loss(loaded)
        parts = []
        with evaluating(loaded.model):
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                parts.append(loss.logits(loss.collate([items[i] for i in rows])).float().cpu())
                told(start + len(rows))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    @classmethod
    def _inputs(cls, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> list[dict[str, Any]]:
        inputs = texts(records, loaded.tokenizer, data.max_length)[0]
        check_ends(loaded.model, [each["input_ids"] for each in inputs], [r.place for r in records])
        return inputs

    @classmethod
    def wanted(cls, record: Record, data: DataConfig) -> Any:
        return None if record.label is None else class_name(record.label)


class Regression(Classification):
    """A quantity for a text, or for a pair of texts."""

    name = "regression"
    unit = "squared error per record"
    answers = "number"

    @classmethod
    def loss(cls, loaded: Pretrained) -> RecordLoss:
        return SquaredLoss(loaded.model, row_padding(loaded.model, pad_id(loaded.tokenizer)))

    @classmethod
    def answers_of(cls, logits: Tensor) -> list[Any]:
        return [float(v) for v in logits[:, 0]]


class Image(Classification):
    """A class of an image."""

    name = "image"
    forms = ("image",)
    counted = "images"

    @classmethod
    def encode(cls, records: Records, loaded: Pretrained, data: DataConfig) -> Encoded:
        return encode_images(records, loaded.tokenizer, data)

    @classmethod
    def loss(cls, loaded: Pretrained) -> RecordLoss:
        return ClassLoss(loaded.model)

    @classmethod
    def _inputs(cls, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> list[dict[str, Any]]:
        return [{"pixel_values": values} for values in pixels(records, loaded.tokenizer)]


TASKS: dict[str, type[Task]] = {cls.name: cls for cls in (Causal, Seq2Seq, Classification, Regression, Image)}


def task_of(data: DataConfig) -> type[Task]:
    """The task that settings say; where they leave it open, the next token's."""
    return TASKS["causal" if data.task == "auto" else data.task]


def recognised(data: DataConfig, records: Records, config: Any) -> DataConfig:
    """`data` with the task that these records and a model of this (transformers) config make, and the names of the classes.
    Raises DataError where they do not fit."""
    name = data.task if data.task != "auto" else _recognised(records, config, data)
    task = TASKS[name]
    if records.form not in task.forms:
        raise DataError(
            f"{records.source}: task {name} learns from {' or '.join(task.forms)} records, and these are {records.form} records."
        )
    labels = data.labels
    if task.answers != "class":
        if labels is not None:
            raise DataError(
                f"labels name classes, and task {name} has none. Leave labels out, or set task: classification."
            )
    elif labels is None:
        labels = _classes(records, config)
    elif len(set(labels)) != len(labels) or len(labels) < 2:
        raise DataError(f"labels is {labels}; it must name at least two classes, each once.")
    return dataclasses.replace(data, task=name, labels=labels)  # type: ignore[arg-type]


def check_labels(data: DataConfig, sets: Sequence[Records]) -> None:
    """Raise one DataError with every record, in any of the sets, whose label is none of the classes, or no number."""
    answers = task_of(data).answers
    problems = []
    for records in sets if answers != "text" else ():
        try:
            if answers == "class":
                class_indices(records.items, data.labels or [], records.source)
            else:
                quantities(records.items, records.source)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def _recognised(records: Records, config: Any, data: DataConfig) -> str:
    if records.form == "image":
        return "image"
    if records.form == "labelled":
        return (
            "regression" if data.labels is None and are_quantities(records.items, records.source) else "classification"
        )
    encodes = bool(getattr(config, "is_encoder_decoder", False)) and records.form in Seq2Seq.forms
    return "seq2seq" if encodes else "causal"


def _classes(records: Records, config: Any) -> list[str]:
    """Those of the records; in the order of the model's head, where it has one for these."""
    found = class_names(records.items, records.source)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith(("ForSequenceClassification", "ForImageClassification")):
        own = [class_name(config.id2label[i]) for i in sorted(config.id2label)]
        if set(found) <= set(own):
            return own
    return found


def _with_new(tokenizer: Any, rows: int, folder: Path) -> int:
    """How many rows an embedding needs for the adapter's and its tokenizer's tokens. Warn of those that neither the adapter nor
    the base has a row for."""
    if not (lacking := tokens_beyond(tokenizer, rows)):
        return rows
    log.warning(
        "The tokenizer in %s has tokens up to %d, the model's embedding %d rows with the adapter: %s get the mean of all others.",
        folder, max(lacking.values()), rows, ", ".join(list(lacking)[:5]) + (" …" if len(lacking) > 5 else ""),
    )  # fmt: skip
    return max(lacking.values()) + 1
