"""How good is this model on these records? Loss of the references and scores of what it answers. Prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltaw.config import DataConfig, GenerateConfig
from deltaw.data import Record, Records, references
from deltaw.data.labels import class_indices, quantities
from deltaw.modes import evaluating
from deltaw.positions import within
from deltaw.pretrained import Pretrained
from deltaw.study.metrics import (
    CLASS_METRICS,
    METRICS,
    NUMBER_METRICS,
    TEXT_METRICS,
    Score,
    check_metrics,
    perplexity,
    ratio,
)
from deltaw.tasks import Task, task_of
from deltaw.training.loss import Loss

_OF_ANSWERS = {"text": METRICS, "class": ("loss", *CLASS_METRICS), "number": ("loss", *NUMBER_METRICS)}


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model, as it stood (base, adapter or merged), on one set of records."""

    items: int
    """Distinct prompts, or records with a label."""
    scores: dict[str, Score]
    predictions: list[str]
    """One for each item; empty when only the loss was asked for."""
    seconds: float


@dataclass(frozen=True)
class Items:
    """Records grouped by prompt."""

    records: list[Record]
    """One of each prompt."""
    references: list[list[str]]

    @classmethod
    def of(cls, records: Any) -> Items:
        """Records with equal prompts become one item with several references."""
        pairs = references(records)
        return cls([record for record, _ in pairs], [list(refs) for _, refs in pairs])


def metrics_of(data: DataConfig, form: str = "") -> tuple[str, ...]:
    """All metrics of the task that the settings say; records of form text have no prompt to answer."""
    names = _OF_ANSWERS[task_of(data).answers]
    return tuple(m for m in names if form != "text" or m not in TEXT_METRICS)


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Records,
    data: DataConfig,
    generation: GenerateConfig,
    *,
    metrics: Sequence[str] | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Score the model with whatever adapter is active, by `data.task`. Loss is of each prediction over all records. Exact
    match, BLEU and ROUGE-L are of one generated completion for each distinct prompt; accuracy and its like of each record's
    likeliest class. Default: all metrics of the task. Raises ConfigError for an unknown one."""
    known = metrics_of(data, records.form)
    metrics = known if metrics is None else metrics
    check_metrics(metrics, _OF_ANSWERS[task_of(data).answers])
    data, task = within(data, model), task_of(data)
    loaded = Pretrained(model, tokenizer, "")
    began = time.monotonic()
    scores: dict[str, Score] = {}
    if "loss" in metrics or "perplexity" in metrics:
        loss = _loss(task, loaded, records, data, generation.batch)
        scores["loss"], scores["perplexity"] = loss, perplexity(loss)
    answered = [m for m in metrics if m not in scores and m not in ("loss", "perplexity")]
    items, predictions = len(records), list[str]()
    if answered or task.answers == "text":
        of = _text_scores if task.answers == "text" else _label_scores
        items, predictions, more = of(task, loaded, records, data, generation, answered, on_done)
        scores |= more
    return Evaluation(items, {m: scores[m] for m in metrics}, predictions, time.monotonic() - began)


_Scored = tuple[int, list[str], dict[str, Score]]


def _text_scores(
    task: type[Task], loaded: Pretrained, records: Records, data: DataConfig, generation: GenerateConfig,
    metrics: Sequence[str], on_done: Callable[[int], None],
) -> _Scored:  # fmt: skip
    """Of a completion for each distinct prompt."""
    items = Items.of(records)
    if not metrics:
        return len(items.records), [], {}
    said = task.answer(loaded, items.records, data, generation, on_done)
    return len(items.records), said, {m: TEXT_METRICS[m](said, items.references) for m in metrics}


def _label_scores(
    task: type[Task], loaded: Pretrained, records: Records, data: DataConfig, generation: GenerateConfig,
    metrics: Sequence[str], on_done: Callable[[int], None],
) -> _Scored:  # fmt: skip
    """Of each record's class or quantity."""
    said = task.answer(loaded, records.items, data, generation, on_done)
    if task.answers == "number":
        numbers = quantities(records.items, records.source)
        return len(records), [task.said(v, data) for v in said], {m: NUMBER_METRICS[m](said, numbers) for m in metrics}
    names = data.labels or []
    wanted = class_indices(records.items, names, records.source)
    scores = {m: CLASS_METRICS[m](said, wanted, len(names)) for m in metrics}
    return len(records), [task.said(i, data) for i in said], scores


def _loss(task: type[Task], loaded: Pretrained, records: Records, data: DataConfig, batch: int) -> Score:
    """Of each prediction, resampled by record."""
    return ratio(*record_losses(task.loss(loaded), task.encode(records, loaded, data).examples, batch))


@torch.no_grad()
def record_losses(loss: Loss, examples: Sequence[Any], batch: int) -> tuple[list[float], list[float]]:
    """Of each example the sum of its predictions' losses, and their number."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    sums, counts = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples), dtype=torch.float64)
    with evaluating(loss.model):
        for start in range(0, len(order), batch):
            own = torch.tensor(order[start : start + batch])
            losses, of_row = loss.each(loss.collate([examples[i] for i in own]))
            sums.index_add_(0, own[of_row], losses.double().cpu())
            counts[own] += torch.bincount(of_row, minlength=len(own))
    return sums.tolist(), counts.tolist()
