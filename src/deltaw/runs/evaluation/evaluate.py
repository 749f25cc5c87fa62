"""A model's scores on records: the loss of the references, and metrics of its answers. Prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.config import DataConfig, GenerateConfig
from deltaw.data import Record, Records, references
from deltaw.data.encode import Example
from deltaw.data.items import Item
from deltaw.data.prompts import item_numbers
from deltaw.errors import AdapterError, DataError, FileError
from deltaw.files import units
from deltaw.layers.tree import evaluating, is_finite
from deltaw.model.inputs import within
from deltaw.model.pretrained import Pretrained
from deltaw.model.switch import at_fault
from deltaw.progress import say, shown
from deltaw.runs.evaluation.bootstrap import ItemScore
from deltaw.runs.evaluation.card import Card
from deltaw.runs.evaluation.classes import Confusion
from deltaw.runs.evaluation.metrics import (
    CLASS_METRICS,
    METRICS,
    NUMBER_METRICS,
    TEXT_METRICS,
    check_metrics,
    perplexity,
    ratio,
)
from deltaw.training.losses import Loss, attention_for
from deltaw.training.tasks import Scored, Task, task_of

_OF_ANSWERS = {"text": METRICS, "class": ("loss", *CLASS_METRICS), "number": ("loss", *NUMBER_METRICS)}
_OF_LOSSES = {"loss", "perplexity"}


class RecordLosses(NamedTuple):
    """The losses of each record."""

    sums: list[float]
    """Over the record's predictions."""
    counts: list[float]
    """The number of its predictions."""
    items: list[int]
    """The number of its item, which records with the same prompt share."""


@dataclass(frozen=True, repr=False)
class Evaluation(Card):
    """Scores of one model in its present state (base, adapter or merged) on one set of records."""

    records: int
    """Number of scored records."""
    items: int
    """Number of their items, the units that intervals resample."""
    scores: dict[str, ItemScore]
    predictions: list[str]
    """The answer to each distinct prompt, or labelled record; empty if only the loss of texts was asked for."""
    losses: RecordLosses | None
    """None if the loss of texts was not asked for."""
    seconds: float
    confusion: Confusion | None = None
    """The confusion matrix; None for tasks without classes."""

    def card(self) -> tuple[str, dict[str, str]]:
        """Return the records, the scores and the time, in a few lines."""
        scores = {metric: str(score) for metric, score in self.scores.items()}
        return f"Scores on {self.records:,} records of {self.items:,} items", scores | {
            "time": units.duration(self.seconds)
        }


@dataclass(frozen=True)
class Questions:
    """Records grouped by prompt."""

    records: list[Record]
    """The first record of each prompt."""
    references: list[list[str]]
    items: list[int]
    """The number of each prompt's item."""

    @classmethod
    def of(cls, records: Records) -> Questions:
        """Group records with equal prompts into one question with several references."""
        pairs = references(records)
        asked = [record for record, _ in pairs]
        return cls(asked, [list(refs) for _, refs in pairs], item_numbers(asked))


def metrics_of(data: DataConfig, form: str = "") -> tuple[str, ...]:
    """Return all metrics of the task in `data`. Records of form text have no prompt to answer."""
    names = _OF_ANSWERS[task_of(data).answers]
    return tuple(m for m in names if form != "text" or m not in TEXT_METRICS)


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor,
    records: Records,
    data: DataConfig,
    generation: GenerateConfig,
    *,
    metrics: Sequence[str] | None = None,
    progress: bool = True,
    on_done: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Score the model, with the adapter that is active, on records of `data.task`.

    The loss is the mean over all predictions of all records. Exact match, BLEU and ROUGE-L score one completion for each distinct
    prompt. Metrics of classes and numbers score each record, by the same pass as the loss. Intervals resample items.

    Args:
        metrics: Names of scores. Default: all of the task.
        progress: Show what goes on: a line that moves in a terminal and a notebook, plain lines on standard error elsewhere.
        on_done: Called with the number of records answered so far.

    Raises:
        ConfigError: A metric is unknown, or its package is not installed.
        DataError: Logits or a loss are not finite, so that no score would mean anything. It says whether the base makes them so
            or an adapter.
    """
    known = metrics_of(data, records.form)
    metrics = known if metrics is None else metrics
    check_metrics(metrics, _OF_ANSWERS[task_of(data).answers])
    data, task = within(data, model), task_of(data)
    # A module with the interface of transformers' models, torch.compile's for example
    loaded = Pretrained(cast(PreTrainedModel, model), tokenizer, "")
    began = time.monotonic()

    def told(count: int) -> None:
        say("answering", count, len(records))
        on_done(count)

    arguments = (loaded, records, data, generation, metrics, told)
    try:
        with shown(progress, "scoring"):
            judged = _of_labels(task, *arguments) if isinstance(task, Scored) else _of_texts(task, *arguments)
    except (AdapterError, FileError) as error:  # outputs that are not finite, by the adapter or by the base
        raise DataError(f"There is no score: {error}") from error
    scored, items, predictions, scores, losses, confusion = judged
    if losses is not None and _OF_LOSSES & set(metrics):
        scores["loss"] = ratio(*losses)
        if "perplexity" in metrics:
            scores["perplexity"] = perplexity(scores["loss"])
    asked = {m: scores[m] for m in metrics}
    return Evaluation(scored, items, asked, predictions, losses, time.monotonic() - began, confusion)


class _Judged(NamedTuple):
    """The parts of an `Evaluation` that its task decides."""

    records: int
    items: int
    predictions: list[str]
    scores: dict[str, ItemScore]
    losses: RecordLosses | None
    confusion: Confusion | None = None


def _of_texts(
    task: Task, loaded: Pretrained, records: Records, data: DataConfig, generation: GenerateConfig,
    metrics: Sequence[str], on_done: Callable[[int], None],
) -> _Judged:  # fmt: skip
    """Score a completion for each distinct prompt, and the loss of all references."""
    losses, said = None, list[str]()
    if _OF_LOSSES & set(metrics):
        encoded = task.encode(records, loaded, data)
        items = item_numbers(records.only(encoded.records).items)
        losses = record_losses(task.loss(loaded), encoded.examples, generation.batch, items)
    scores, answered = dict[str, ItemScore](), [m for m in metrics if m in TEXT_METRICS]
    if answered:
        asked = Questions.of(_as_learnt(task, loaded, records, data))
        said = [str(a) for a in task.answer(loaded, asked.records, data, generation, on_done)]
        scores = {m: TEXT_METRICS[m](said, asked.references, asked.items) for m in answered}
    return _Judged(len(records), len(set(item_numbers(records.items))), said, scores, losses)


def _as_learnt(task: Task, loaded: Pretrained, records: Records, data: DataConfig) -> Records:
    """Return the records with their answers as a model that learnt them writes them."""
    answers = task.learnt(loaded, records.items, data)
    items = [replace(record, completion=answer) for record, answer in zip(records, answers, strict=True)]
    return replace(records, items=items)


def _of_labels(
    task: Scored, loaded: Pretrained, records: Records, data: DataConfig, generation: GenerateConfig,
    metrics: Sequence[str], on_done: Callable[[int], None],
) -> _Judged:  # fmt: skip
    """Score each record's class or number."""
    encoded = task.encode(records, loaded, data)
    examples, items = encoded.examples, item_numbers(records.only(encoded.records).items)
    logits, wanted = task.logits(loaded, examples, generation.batch, on_done), [e.target for e in examples]
    said, labels, confusion = task.answers_of(logits), data.labels or [], None
    if task.answers == "number":
        scores = {m: NUMBER_METRICS[m](said, wanted, items) for m in metrics if m in NUMBER_METRICS}
    else:
        numbers = [int(a) for a in said]
        scores = {m: CLASS_METRICS[m](numbers, wanted, len(labels), items) for m in metrics if m in CLASS_METRICS}
        confusion = Confusion.of(numbers, [int(w) for w in wanted], labels)
    losses = task.loss(loaded).of(logits, torch.tensor(wanted)).tolist()
    told = [task.said(a, data) for a in said]
    return _Judged(
        len(examples), len(set(items)), told, scores, RecordLosses(losses, [1.0] * len(losses), items), confusion
    )


def _losses(loss: Loss, inputs: Any) -> Tensor:
    return loss.each(inputs)[0]


@torch.no_grad()
def record_losses(loss: Loss, examples: Sequence[Example | Item], batch: int, items: list[int]) -> RecordLosses:
    """Return the losses of each example, `batch` at a time. items: the number of each one's item.

    Raises AdapterError or FileError for a loss that is not finite.
    """
    name = getattr(loss.model, "name_or_path", "")
    sums, counts = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples), dtype=torch.float64)
    with evaluating(loss.model), attention_for(loss, examples):
        order = loss.order(examples)
        for start in range(0, len(order), batch):
            say("scoring", start, len(order))
            rows = torch.tensor(order[start : start + batch])
            inputs = loss.collate([examples[i] for i in rows])
            losses, of_row = loss.each(inputs)
            if not is_finite(losses):
                raise at_fault(loss.model, partial(_losses, loss, inputs), name=name)
            sums.index_add_(0, rows[of_row], losses.double().cpu())
            counts[rows] += torch.bincount(of_row, minlength=len(rows))
    return RecordLosses(sums.tolist(), counts.tolist(), items)
