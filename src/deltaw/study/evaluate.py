"""How good is this model on these records? Loss of the references and scores of what it answers. Prints nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from deltaw.config import DataConfig, GenerateConfig
from deltaw.data import Record, Records, as_said, references
from deltaw.errors import DataError
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
from deltaw.tasks import Classification, Task, task_of
from deltaw.training.loss import Loss

_OF_ANSWERS = {"text": METRICS, "class": ("loss", *CLASS_METRICS), "number": ("loss", *NUMBER_METRICS)}
_OF_LOSSES = {"loss", "perplexity"}


class RecordLosses(NamedTuple):
    """Of each record the sum of its predictions' losses, and their number."""

    sums: list[float]
    counts: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model, as it stood (base, adapter or merged), on one set of records."""

    items: int
    """Distinct prompts, or records with a label."""
    scores: dict[str, Score]
    predictions: list[str]
    """One for each item; empty where only the loss of texts was asked for."""
    losses: RecordLosses | None
    """None where that of texts was not asked for."""
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
    likeliest class, by the same pass as the loss. Default: all metrics of the task. Raises ConfigError for an unknown one, and
    DataError where a loss is not finite: no score would say anything then."""
    known = metrics_of(data, records.form)
    metrics = known if metrics is None else metrics
    check_metrics(metrics, _OF_ANSWERS[task_of(data).answers])
    data, task = within(data, model), task_of(data)
    loaded = Pretrained(model, tokenizer, "")
    began = time.monotonic()
    given = (loaded, records, data, generation, metrics, on_done)
    judged = _of_labels(task, *given) if issubclass(task, Classification) else _of_texts(task, *given)
    items, predictions, scores, losses = judged
    _check_finite(losses)
    if losses is not None and _OF_LOSSES & set(metrics):
        scores["loss"] = ratio(*losses)
        scores["perplexity"] = perplexity(scores["loss"])
    return Evaluation(items, {m: scores[m] for m in metrics}, predictions, losses, time.monotonic() - began)


def _check_finite(losses: RecordLosses | None) -> None:
    if losses is None:
        return
    bad = sum(not math.isfinite(each) for each in losses.sums)
    if bad:
        raise DataError(
            f"The loss of {bad} of {len(losses.sums)} records is not finite under this model: it has weights that are too "
            "large or not numbers, or its dtype is too narrow for them.\nTry --dtype float32; if that changes nothing, its "
            "training went wrong."
        )


_Judged = tuple[int, list[str], dict[str, Score], RecordLosses | None]


def _of_texts(
    task: type[Task], loaded: Pretrained, records: Records, data: DataConfig, generation: GenerateConfig,
    metrics: Sequence[str], on_done: Callable[[int], None],
) -> _Judged:  # fmt: skip
    """Of a completion for each distinct prompt, and the loss of all completions that there are."""
    losses, said, items = None, list[str](), Items.of(records)
    if _OF_LOSSES & set(metrics):
        losses = record_losses(task.loss(loaded), task.encode(records, loaded, data).examples, generation.batch)
    answered = [m for m in metrics if m in TEXT_METRICS]
    if answered:
        said = task.answer(loaded, items.records, data, generation, on_done)
    plain = iter(as_said([text for texts in items.references for text in texts], loaded.tokenizer))
    wanted = [[next(plain) for _ in texts] for texts in items.references]
    return len(items.records), said, {m: TEXT_METRICS[m](said, wanted) for m in answered}, losses


def _of_labels(
    task: type[Classification], loaded: Pretrained, records: Records, data: DataConfig, generation: GenerateConfig,
    metrics: Sequence[str], on_done: Callable[[int], None],
) -> _Judged:  # fmt: skip
    """Of each record's class or quantity."""
    examples = task.encode(records, loaded, data).examples
    logits, wanted = task.logits(loaded, examples, generation.batch, on_done), [e.target for e in examples]
    said, labels = task.answers_of(logits), len(data.labels or [])
    if task.answers == "number":
        scores = {m: NUMBER_METRICS[m](said, wanted) for m in metrics if m in NUMBER_METRICS}
    else:
        scores = {m: CLASS_METRICS[m](said, wanted, labels) for m in metrics if m in CLASS_METRICS}
    losses = task.loss(loaded).of(logits, torch.tensor(wanted)).tolist()
    return len(examples), [task.said(a, data) for a in said], scores, RecordLosses(losses, [1.0] * len(losses))


@torch.no_grad()
def record_losses(loss: Loss, examples: Sequence[Any], batch: int) -> RecordLosses:
    """Of each example."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    sums, counts = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples), dtype=torch.float64)
    with evaluating(loss.model):
        for start in range(0, len(order), batch):
            own = torch.tensor(order[start : start + batch])
            losses, of_row = loss.each(loss.collate([examples[i] for i in own]))
            sums.index_add_(0, own[of_row], losses.double().cpu())
            counts[own] += torch.bincount(of_row, minlength=len(own))
    return RecordLosses(sums.tolist(), counts.tolist())
