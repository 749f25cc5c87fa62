"""The part that a sweep's or a comparison's candidates share: a folder that is resumed, three sets of records, metrics. Knows
records, settings and files; no weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltaw.config import DataConfig, TrainConfig, to_mapping
from deltaw.data import Records, read
from deltaw.data.prompts import described, overlap
from deltaw.errors import ConfigError
from deltaw.files.formats.atomic import write_text
from deltaw.model.pretrained import read_config
from deltaw.runs import splits
from deltaw.runs.evaluation.evaluate import metrics_of
from deltaw.runs.evaluation.metrics import MORE_IS_BETTER, check_metrics, installed
from deltaw.runs.folder import read_json
from deltaw.runs.reports.page import Report
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.results import JsonObject
from deltaw.runs.results.study import StudySettings
from deltaw.runs.resume.place import refuse_a_file
from deltaw.training.tasks import check_labels, recognised, task_of

# By default; the last one that is installed ranks
_USUAL = {
    "text": ("loss",),
    "class": ("loss", "matthews", "f1", "accuracy"),
    "number": ("loss", "spearman", "pearson"),
}


@dataclass(frozen=True)
class Scoring:
    """The metrics of all candidates."""

    data: DataConfig
    """The settings of the records, with their task and its classes."""
    metrics: tuple[str, ...]
    chosen_by: str
    """The metric by which a learning rate is chosen on held-out records. For texts the loss: a score would take generating. For
    classes and numbers a score, which is what such a model is for."""
    sets: dict[str, str]
    """train, valid, test → what is in it, for example "300 records of 47 prompts"."""
    warnings: tuple[str, ...]
    """Sets that have prompts in common."""

    def order(self, valid_loss: float | None, valid_scores: Mapping[str, float]) -> tuple[float, float]:
        """Return what to sort runs by, the best first: their score on held-out records, then their loss there."""
        score = valid_scores.get(self.chosen_by, valid_loss)
        return _or_last(score, more_is_better=self.chosen_by in MORE_IS_BETTER), _or_last(valid_loss)


@dataclass(frozen=True)
class Study:
    """A sweep's or a comparison's folder, with what is the same for all its candidates."""

    folder: Path
    config: TrainConfig
    """The settings of training; the learning rate is each candidate's."""
    settings: StudySettings
    """The settings that decide about results."""
    scoring: Scoring

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def records(self, name: str) -> str:
        """Return the file of train, valid or test."""
        return str(splits.file_of(self.folder / "data", name))

    def keep(self, results: dict[str, object], report: Report) -> None:
        """Write results.json and report.html."""
        write_text(self.folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_report(report, self.report)


def opened(
    kind: str,
    settings: StudySettings,
    source: splits.Source,
    config: TrainConfig,
    metrics: str,
) -> Study:
    """Begin a study in `config.out`, or resume the one that is there.

    Args:
        kind: "sweep" or "comparison", which the settings' file in the folder is called.
        settings: what must be the same for the study that is there to be resumed.
        source: where the three sets come from.
        config: the settings of training.
        metrics: names with commas; empty for the usual ones of the task.

    Returns:
        The study, its folder claimed and its three sets of records written.

    Raises:
        ConfigError: something else is in the folder, or there is no such metric.
        DataError: the records cannot be used, or are too few.
    """
    folder = Path(config.out)
    claim(folder, kind, settings.to_json(), overwrite=config.overwrite)
    splits.write(folder / "data", source, config.data, valid_most=config.valid_most, test_most=settings.test_most)
    return Study(folder, config, settings, scoring_of(folder / "data", config.data, settings.model, metrics))


def scoring_of(sets: Path, data: DataConfig, model: str, metrics: str) -> Scoring:
    """Return what candidates are scored by, from the files of the three sets.

    sets: their folder. metrics: names with commas; empty for the usual ones of the task. Raises ConfigError for an unknown metric
    and DataError for records that do not fit each other.
    """
    records = [read(splits.file_of(sets, name), data) for name in splits.NAMES]
    data = recognised(data, records[0], read_config(model))
    check_labels(data, records)
    chosen = metrics_for(metrics, data, records[0].form)
    described_sets = {name: described(part.items) for name, part in zip(splits.NAMES, records, strict=True)}
    chosen_by = chosen[-1] if task_of(data).answers != "text" else "loss"
    return Scoring(data, tuple(chosen), chosen_by, described_sets, _overlaps(*records))


def _overlaps(train: Records, valid: Records, test: Records) -> tuple[str, ...]:
    warnings = (overlap(valid.items, train.items), overlap(test.items, train.items, "test"))
    return tuple(warning for warning in warnings if warning)


def metrics_for(text: str, data: DataConfig, form: str) -> list[str]:
    """Return the metrics named in `text`, with commas, or else the usual ones for records of this task and form. Raises
    ConfigError for an unknown metric."""
    asked = [m.strip() for m in text.split(",") if m.strip()]
    chosen = asked or [m for m in _USUAL[task_of(data).answers] if installed(m)]
    check_metrics(chosen, metrics_of(data, form))
    return chosen


def _or_last(value: float | None, *, more_is_better: bool = False) -> float:
    """Return what to sort a figure by, the best first; one that is missing or not a number comes last."""
    if value is None or math.isnan(value):
        return math.inf
    return -value if more_is_better else value


# --- the folder ---------------------------------------------------------------------------------------------------


def shared_settings(config: TrainConfig) -> dict[str, object]:
    """Return the settings of training that all candidates share."""
    return {k: v for k, v in to_mapping(config).items() if k not in ("out", "overwrite", "save_every", "lr", "valid")}


def claim(folder: Path, kind: str, settings: dict[str, object], *, overwrite: bool) -> None:
    """Resume a study of these settings, or begin it.

    kind: the name of the settings' file, without its ending. settings: what must be equal, those of training under "run". Raises
    ConfigError where something else is in the folder, unless `overwrite` may replace it.
    """
    path = folder / f"{kind}.json"
    refuse_a_file(folder)
    if folder.is_dir() and any(folder.iterdir()):
        known = read_json(path)
        begun = known is None or (folder / "runs").exists()
        if known != settings and begun and not overwrite:
            what = (
                f"a {kind} with other settings ({', '.join(_differing(known, settings))})"
                if known
                else "something else"
            )
            raise ConfigError(
                f"The folder {folder} holds {what}. Choose another --out, or pass --overwrite to replace it."
            )
        if known != settings:
            shutil.rmtree(folder)
    write_text(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def _differing(known: JsonObject, settings: JsonObject) -> list[str]:
    """Return the names of settings that are not the same."""
    of_training = sorted(k for k in settings["run"] if known["run"].get(k) != settings["run"][k])
    return of_training + sorted(k for k in settings if k != "run" and known.get(k) != settings[k])
