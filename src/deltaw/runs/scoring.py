"""What the candidates of a study are scored by: the task of its records, the metrics, and which of them chooses. Knows records
and configs; no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltaw.config import DataConfig
from deltaw.data import Records, read
from deltaw.data.prompts import described, overlap
from deltaw.model.pretrained import read_config
from deltaw.runs import splits
from deltaw.runs.evaluation.evaluate import metrics_of
from deltaw.runs.evaluation.metrics import check_metrics, installed
from deltaw.training.tasks import check_labels, recognised, task_of

# By default the last one that is installed ranks
_USUAL = {
    "text": ("loss",),
    "class": ("loss", "matthews", "f1", "accuracy"),
    "number": ("loss", "spearman", "pearson"),
}


@dataclass(frozen=True)
class Scoring:
    """The same for all candidates."""

    data: DataConfig
    """With the task, and its classes."""
    metrics: tuple[str, ...]
    chosen_by: str
    """What learning rates are chosen by on held-out records. Of text the loss: a score would take generating; and of classes the
    score: a loss is less than a classifier is for."""
    sets: dict[str, str]
    """train, valid, test → what is in it, for example "300 records of 47 prompts"."""
    warnings: tuple[str, ...]
    """Where prompts of one set are in another."""


def scoring_of(sets: Path, data: DataConfig, model: str, metrics: str) -> Scoring:
    """By the three sets' files. `metrics`: names with commas, or nothing for the usual ones. Raises ConfigError or DataError."""
    records = [read(splits.file_of(sets, name), data) for name in splits.NAMES]
    data = recognised(data, records[0], read_config(model))
    check_labels(data, records)
    chosen = metrics_for(metrics, data, records[0].form)
    described_sets = {name: described(part.items) for name, part in zip(splits.NAMES, records, strict=True)}
    chosen_by = chosen[-1] if task_of(data).answers != "text" else "loss"
    return Scoring(data, tuple(chosen), chosen_by, described_sets, _overlaps(*records))


def _overlaps(train: Records, valid: Records, test: Records) -> tuple[str, ...]:
    found = (overlap(valid.items, train.items), overlap(test.items, train.items, "test"))
    return tuple(warning for warning in found if warning)


def metrics_for(text: str, data: DataConfig, form: str) -> list[str]:
    """Those with commas in `text`, or the usual ones of records of this task and form. Raises ConfigError for one that there is
    not."""
    given = [m.strip() for m in text.split(",") if m.strip()]
    chosen = given or [m for m in _USUAL[task_of(data).answers] if installed(m)]
    check_metrics(chosen, metrics_of(data, form))
    return chosen
