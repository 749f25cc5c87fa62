"""The part that a sweep's or a comparison's candidates share: a folder that is resumed, three sets of records, metrics. Knows
records, settings and files; no weights."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deltaw.config import DataConfig, TrainConfig, to_mapping
from deltaw.data import Records, read
from deltaw.data.labels import only_in_one
from deltaw.data.prompts import described, overlap
from deltaw.errors import ConfigError
from deltaw.files.formats.atomic import check_apart, write_text
from deltaw.model.pretrained import read_config
from deltaw.runs import splits
from deltaw.runs.evaluation.evaluate import metrics_of
from deltaw.runs.evaluation.metrics import MORE_IS_BETTER, check_metrics, installed
from deltaw.runs.folder import read_json
from deltaw.runs.reports.page import Report
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.results import JsonObject
from deltaw.runs.results.study import StudySettings
from deltaw.runs.resume.place import RunFolder, at_work
from deltaw.training.tasks import check_labels, recognised, task_of

# By default; the last one that is installed ranks
_USUAL = {
    "text": ("loss",),
    "class": ("loss", "matthews", "f1", "accuracy"),
    "number": ("loss", "spearman", "pearson"),
}


def for_candidates(config: TrainConfig) -> TrainConfig:
    """Return the settings that candidates are trained with: without samples. (The worker leaves trackers out.)

    Raises ConfigError where a tracker is asked for by name: it hears of one run.
    """
    if config.track not in ("auto", "none"):
        raise ConfigError(f"track is {config.track}: trackers hear of one run. The study's results are in its folder.")
    return replace(config, samples=0, track="auto")


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
    """Sets that have prompts in common, and classes that a set lacks."""
    epochs: float = 1.0
    """Passes over the training records, where the settings name none."""

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
    notes: tuple[str, ...] = ()
    """Sentences on how the records were read, and on the fields that are not used."""

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def records(self, name: str) -> str:
        """Return the file of train, valid or test."""
        return str(splits.file_of(self.folder / "data", name))

    def keep(self, results: dict[str, object], report: Report) -> None:
        """Write results.json and report.html; a study before this one, which was set aside, goes."""
        write_report(report, self.report)
        write_text(self.folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(self.folder / _PREVIOUS, ignore_errors=True)


@contextlib.contextmanager
def opened(
    kind: str,
    settings: StudySettings,
    source: splits.Source,
    config: TrainConfig,
    metrics: str,
) -> Iterator[Study]:
    """Begin a study in `config.out`, or resume the one that is there. While open, no other process can.

    A study that is to be replaced is set aside in previous/, and removed when the new one has results.

    Args:
        kind: "sweep" or "comparison", which the settings' file in the folder is called.
        settings: what must be the same for the study that is there to be resumed.
        source: where the three sets come from.
        config: the settings of training.
        metrics: names with commas; empty for the usual ones of the task.

    Yields:
        The study, its folder claimed and its three sets of records written.

    Raises:
        ConfigError: something else is in the folder, another process is at work there, or there is no such metric.
        FileError: there is no such model.
        DataError: the records cannot be used, or are too few.
    """
    folder = Path(config.out)
    with at_work(RunFolder(folder)):
        read_config(settings.model, trust_remote_code=config.trust_remote_code)
        inputs = {"the base": settings.model, "the data": source.data}
        check_apart(folder, inputs | {"the held-out records": source.valid, "the test records": source.test})
        resumed = claimed(folder, kind, settings.to_json(), overwrite=config.overwrite)
        there = all(splits.file_of(folder / "data", name).is_file() for name in splits.NAMES)
        sets = None if resumed and there else splits.read(source, config.data, config.valid_most, settings.test_most)
        if not resumed:
            set_aside(folder)
        try:
            if not resumed:
                write_text(folder / f"{kind}.json", json.dumps(settings.to_json(), indent=1, ensure_ascii=False) + "\n")
            if sets is not None:
                splits.write(folder / "data", sets)
            written = replace(config, data=splits.as_written(config.data))
            scoring = scoring_of(folder / "data", written, settings.model, metrics)
        except BaseException:
            if not resumed:
                bring_back(folder)
            raise
        # All candidates pass over the records as often, and the results say how often
        config = replace(config, epochs=scoring.epochs if config.epochs is None else config.epochs)
        settings = replace(settings, run={**settings.run, "epochs": config.epochs})
        yield Study(folder, config, settings, scoring, splits.notes(folder / "data"))


def scoring_of(sets: Path, config: TrainConfig, model: str, metrics: str) -> Scoring:
    """Return what candidates are scored by, from the files of the three sets.

    sets: their folder. metrics: names with commas; empty for the usual ones of the task. Raises ConfigError for an unknown metric
    and DataError for records that do not fit each other.
    """
    records = [read(splits.file_of(sets, name), config.data) for name in splits.NAMES]
    data = recognised(config.data, records[0], read_config(model, trust_remote_code=config.trust_remote_code))
    check_labels(data, records)
    chosen = metrics_for(metrics, data, records[0].form)
    described_sets = {name: described(part.items) for name, part in zip(splits.NAMES, records, strict=True)}
    chosen_by = chosen[-1] if task_of(data).answers != "text" else "loss"
    epochs = task_of(data).usual_epochs(len(records[0]))
    return Scoring(data, tuple(chosen), chosen_by, described_sets, _warnings(data, *records), epochs)


def _warnings(data: DataConfig, train: Records, valid: Records, test: Records) -> tuple[str, ...]:
    """Return warnings of prompts that are in two sets, and of classes that one lacks."""
    warnings = [overlap(valid.items, train.items), overlap(test.items, train.items, "test")]
    if task_of(data).answers == "class":
        warnings += [only_in_one(valid.items, train.items), only_in_one(test.items, train.items, "test")]
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
    """Return the settings of training that all candidates share and that decide about results."""
    others = ("out", "overwrite", "save_every", "trust_remote_code", "lr", "valid")
    return {k: v for k, v in to_mapping(config).items() if k not in others}


def with_defaults(run: Mapping[str, object], now: Mapping[str, object]) -> dict[str, object]:
    """Return settings of training as a version of before wrote them, with the defaults of those that it did not have."""
    defaults = to_mapping(TrainConfig())
    return {key: run.get(key, defaults.get(key)) for key in now} | dict(run)


def claimed(folder: Path, kind: str, settings: JsonObject, *, overwrite: bool) -> bool:
    """Return whether the folder has a study of these settings, which is resumed, or is free for a new one. Nothing changes.

    kind: the name of the settings' file, without its ending. settings: what must be equal, those of training under "run". Raises
    ConfigError where something else is in the folder, unless `overwrite` may replace it.
    """
    known = read_json(folder / f"{kind}.json")
    if known is not None and "run" in known:
        known["run"] = with_defaults(known["run"], settings["run"])
    if known == settings:
        return True
    begun = known is None or (folder / "runs").exists()
    others = [path for path in folder.iterdir() if path.name not in (".lock", _PREVIOUS)]
    if others and begun and not overwrite:
        differing = f"a {kind} with other settings ({', '.join(_differing(known, settings))})" if known else ""
        raise ConfigError(
            f"The folder {folder} holds {differing or 'something else'}. Choose another --out, or pass --overwrite to replace it."
        )
    return False


_PREVIOUS = "previous"
# The settings first: without them nothing takes the rest for a study that can be resumed
_FILES = (
    "sweep.json",
    "comparison.json",
    "results.json",
    "report.html",
    "timing.json",
    "latency.json",
    "output.txt",
    "data",
    "runs",
)


def set_aside(folder: Path) -> None:
    """Move the study in a folder into previous/; one there that has results stays, and the newer one without goes."""
    previous = folder / _PREVIOUS
    if (previous / "results.json").exists() and not (folder / "results.json").exists():
        _remove(folder)
        return
    files = [folder / name for name in _FILES if (folder / name).exists()]
    if files:
        _remove(previous)
        previous.mkdir(exist_ok=True)
    for path in files:
        path.rename(previous / path.name)


def bring_back(folder: Path) -> None:
    """Undo `set_aside`."""
    previous = folder / _PREVIOUS
    _remove(folder)
    if previous.is_dir():
        for path in previous.iterdir():
            path.rename(folder / path.name)
        previous.rmdir()


def _remove(folder: Path) -> None:
    """Remove the files of a study."""
    for path in (folder / name for name in _FILES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _differing(known: JsonObject, settings: JsonObject) -> list[str]:
    """Return the names of settings that are not the same."""
    of_training = sorted(k for k in settings["run"] if known["run"].get(k) != settings["run"][k])
    return of_training + sorted(k for k in settings if k != "run" and known.get(k) != settings[k])
