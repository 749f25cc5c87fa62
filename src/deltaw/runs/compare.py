"""Methods compared on a user's own model and data: learning rates on held-out records, the best one of each method on test
records, all with the same records in the same order and the same budget. Prints nothing; it emits events.

A comparison's folder holds data/ (the three sets of records), runs/ (a folder for each candidate), results.json and report.html.
What is finished there is not trained again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from deltaw.config import CompareConfig, TrainConfig, check_is, to_mapping
from deltaw.errors import ConfigError
from deltaw.files import units
from deltaw.files.formats.atomic import write_text
from deltaw.methods.registry import DEFAULT, METHODS, QUICK, Contestant, contestants, described, rates
from deltaw.model.inputs import hidden_size_of
from deltaw.model.pretrained import read_config
from deltaw.progress import Runs, named, shown, tell
from deltaw.runs import splits, study, worker
from deltaw.runs.apart import Processes
from deltaw.runs.evaluation.bootstrap import Compared, Measured, compared
from deltaw.runs.evaluation.card import Card
from deltaw.runs.evaluation.metrics import MORE_IS_BETTER
from deltaw.runs.events import CandidateFinished, CandidateStarted, CompareEvent, RecordsRead, TimingStarted
from deltaw.runs.folder import read_json
from deltaw.runs.memory import machine
from deltaw.runs.reports.compare import comparison_report
from deltaw.runs.results import JsonObject
from deltaw.runs.results.compare import (
    BestRun,
    CandidateScore,
    CandidateTask,
    ComparisonResults,
    LatencyRow,
    MethodRow,
    Outcome,
    TimingTask,
    TriedRate,
    outcome_from,
)
from deltaw.runs.results.scores import measured_by, over_seeds
from deltaw.runs.results.study import Failed, StudySettings
from deltaw.runs.resume.place import RunFolder
from deltaw.runs.study import Study, for_candidates

# --quick: so that five methods are compared within ten minutes on two cores without bfloat16, most of them for training
_QUICK_MINUTES, _QUICK_VALID, _QUICK_TEST = 0.75, 32, 64


class _Timed(NamedTuple):
    """The passes that inference is timed on."""

    passes: list[list[int]]
    """Rows and tokens of each forward pass."""
    decoding: list[int]
    """Rows that are decoded."""
    seconds: float
    """For each of these, all methods together."""


_TIMED = _Timed([[1, 128], [32, 128]], [1, 32], 600.0)
_QUICK_TIMED = _Timed([[1, 128], [32, 16]], [1], 20.0)


@dataclass(frozen=True, repr=False)
class Comparison(Card):
    """The result of `compare`.

    >>> import deltaw
    >>> config = deltaw.TrainConfig(out="methods", steps=1, valid_most=4, overwrite=True)
    >>> options = deltaw.CompareConfig(methods="lora(targets=nothing)", latency=False)
    >>> result = deltaw.compare("model", "train.jsonl", config, options)
    >>> (row,) = result.outcome.rows  # a method that does not fit the model is reported as failed
    >>> row.name, "matches no layer" in row.best.error, len(result.outcome.trained)
    ('lora(targets=nothing)', True, 0)
    """

    folder: Path
    """The comparison's folder."""
    report: Path
    """The page about it."""
    outcome: ComparisonResults
    """A row for each method, the methods beside the best, and how long inference takes with each."""

    def card(self) -> tuple[str, dict[str, str]]:
        """Return what was compared on what, the best methods, the time and the place, in a few lines."""
        outcome, settings = self.outcome, self.outcome.settings
        rows = {row.name: f"{outcome.metric} {run.scores[outcome.metric].mean:.4f}" for row, run in outcome.trained[:3]}
        failed = sum(isinstance(row.best, Failed) for row in outcome.rows)
        seconds = sum(run.figures.seconds for _, run in outcome.trained)
        tried = f"{len(outcome.rows)} methods" + (f", {failed} of them without a result" if failed else "")
        rows["tried"] = f"{tried}; the best run of each took {units.duration(seconds)} in all"
        return f"Methods on {settings.model}, trained on {settings.data}, scored on {outcome.sets['test']}", {
            **rows,
            "report": str(self.report),
        }

    @property
    def results(self) -> JsonObject:
        """The plain values of results.json."""
        return self.outcome.to_json()


def compare(
    model: str,
    data: str | Path,
    config: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
    options: CompareConfig = CompareConfig(),  # noqa: B008  (frozen)
    *,
    progress: bool = True,
    on_event: Callable[[CompareEvent], None] = lambda event: None,
) -> Comparison:
    """Train and score each method of `options` with the same budget, and write the report into `config.out`.

    Each candidate is trained in a process of its own. A comparison of the same settings in the folder is resumed. A candidate
    that fails, for example with a loss that is not finite, is reported as failed.

    Args:
        model: a hub id or a folder.
        data: a file, folder or hub data set, with records as `train` takes them.
        config: the settings of every run. Each method has a learning rate of its own, which is not `config.lr`.
        options: the methods and what else is compared.
        progress: show what goes on: a line that moves in a terminal and a notebook, plain lines on standard error elsewhere.
        on_event: called with what happens, as `deltaw.runs.events` has it.

    Returns:
        A row for each method, with its scores on the test records, and the methods beside the best.

    Raises:
        ConfigError: settings that do not fit each other, or another study in the folder. Nothing is trained.
        DataError: records that cannot be used, or are too few. Nothing is trained.
        TrainError: a process ended without a word.
        Interrupted: Ctrl-C. Finished candidates are kept.

    >>> import deltaw
    >>> deltaw.compare("model", "train.jsonl", deltaw.TrainConfig(lr=1e-3))
    Traceback (most recent call last):
    deltaw.errors.ConfigError: Each method has a learning rate of its own: write it in brackets, lora(lr=2e-4), or try --lrs 3.
    """
    check_is(config, TrainConfig, "config")
    check_is(options, CompareConfig, "options")
    if config.lr is not None:
        raise ConfigError(
            "Each method has a learning rate of its own: write it in brackets, lora(lr=2e-4), or try --lrs 3."
        )
    width = hidden_size_of(read_config(model, trust_remote_code=config.trust_remote_code))
    every = contestants(options.methods or (QUICK if options.quick else DEFAULT), width)
    with (
        shown(progress, "compare", on_event) as hear,
        _begun(model, data, config, options) as begun,
        Processes() as processes,
    ):
        if begun.notes:
            hear(RecordsRead(begun.notes))
        tell(Runs(sum(len(rates(contestant.lr, options.lrs)) + options.seeds - 1 for contestant in every)))
        return _finished(_Work(begun, options, hear, processes), every)


@dataclass(frozen=True)
class _Work:
    """A comparison that goes on."""

    begun: Study
    options: CompareConfig
    on_event: Callable[[CompareEvent], None]
    processes: Processes


def _finished(work: _Work, every: Sequence[Contestant]) -> Comparison:
    """Train and time what is not yet, and write the results."""
    begun = work.begun
    entries = [_entry(work, contestant) for contestant in every]
    measurements = [_measurement(begun.scoring.chosen_by, entry) for entry in entries]
    results = ComparisonResults(
        settings=begun.settings,
        environment=machine.describe(),
        chosen_by=begun.scoring.chosen_by,
        sets=begun.scoring.sets,
        warnings=list(begun.scoring.warnings),
        rows=[measurement.row for measurement in measurements],
        compared=_compared(measurements, begun.scoring.metrics[-1]),
        latency=_latencies(work, entries),
        beside_full=_beside_full(measurements, begun.scoring.metrics[-1]),
    )
    begun.keep(results.to_json(), comparison_report(results))
    return Comparison(begun.folder, begun.report, results)


def _begun(
    model: str, data: str | Path, config: TrainConfig, options: CompareConfig
) -> contextlib.AbstractContextManager[Study]:
    """Claim the folder and write the records; --quick has less of everything."""
    config, test_most = for_candidates(config), options.test_most
    if options.quick:
        minutes = None if config.steps else config.minutes or _QUICK_MINUTES
        config = dataclasses.replace(config, minutes=minutes, valid_most=min(config.valid_most, _QUICK_VALID))
        test_most = min(test_most, _QUICK_TEST)
    settings = StudySettings(
        model=model, data=str(data), test=options.test, test_most=test_most, valid=config.valid,
        run=study.shared_settings(config),
    )  # fmt: skip
    source = splits.Source(data, config.data.split, config.valid, options.test)
    return study.opened("comparison", settings, source, config, options.metrics)


# --- candidates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A candidate that was trained to its end."""

    lr: float
    seed: int
    folder: Path
    score: CandidateScore


@dataclass(frozen=True)
class _Entry:
    """A method with its candidates."""

    contestant: Contestant
    tried: Mapping[float, Outcome]
    """Learning rate → what its run came to, with the first seed."""
    runs: list[_Run]
    """Runs with the best learning rate, one a seed, the first seed's first."""


def _entry(work: _Work, contestant: Contestant) -> _Entry:
    """Train a method at all learning rates, then with the other seeds at its best one."""
    begun, options = work.begun, work.options

    def trained(lr: float, seed: int) -> Outcome:
        return _outcome(work, contestant, lr, seed)

    seed, order = begun.config.seed, begun.scoring.order
    tried = {lr: trained(lr, seed) for lr in rates(contestant.lr, options.lrs)}
    scored = {lr: outcome for lr, outcome in tried.items() if isinstance(outcome, CandidateScore)}
    if not scored:
        return _Entry(contestant, tried, [])
    lr = min(scored, key=lambda lr: order(scored[lr].valid_loss, scored[lr].valid_scores))
    outcomes = {seed: scored[lr]} | {other: trained(lr, other) for other in range(seed + 1, seed + options.seeds)}
    runs = [
        _Run(lr, s, _folder(begun, contestant, lr, s), outcome)
        for s, outcome in outcomes.items()
        if isinstance(outcome, CandidateScore)
    ]
    return _Entry(contestant, tried, runs)


def _outcome(work: _Work, contestant: Contestant, lr: float, seed: int) -> Outcome:
    """Return what a candidate came to: as its folder says, or else by training it in a process of its own."""
    begun, on_event = work.begun, work.on_event
    folder = _folder(begun, contestant, lr, seed)
    task = _task(begun, contestant, lr, seed).to_json()
    outcome = _kept(folder, task)
    fresh = outcome is None
    if outcome is None:
        on_event(CandidateStarted(contestant.name, lr, seed))
        _write(folder / worker.CANDIDATE, task)
        run = f"{contestant.name}, lr {lr:g}, seed {seed}"
        with named(lambda _: run):
            work.processes.do("candidate", folder, worker.SCORE)
        outcome = _kept(folder, task)
    assert outcome is not None
    on_event(CandidateFinished(contestant.name, lr, seed, outcome, fresh))
    return outcome


def _folder(begun: Study, contestant: Contestant, lr: float, seed: int) -> Path:
    words = re.sub(r"[^\w.=+]+", "-", contestant.name).strip("-")
    return begun.folder / "runs" / f"{words}-{lr}-{seed}"


def _task(begun: Study, contestant: Contestant, lr: float, seed: int) -> CandidateTask:
    scoring = begun.scoring
    run = to_mapping(dataclasses.replace(begun.config, data=scoring.data))
    run |= {"lr": lr, "seed": seed, "valid": begun.records("valid"), "split": None}
    for name in ("out", "overwrite", "save_every"):
        del run[name]
    return CandidateTask(
        name=contestant.name,
        method=contestant.kind,
        settings=to_mapping(contestant.method),
        model=begun.settings.model,
        train=begun.records("train"),
        test=begun.records("test"),
        metrics=list(scoring.metrics),
        run=run,
        valid_metrics=[] if scoring.chosen_by == "loss" else [scoring.chosen_by],
    )


def _kept(folder: Path, task: dict[str, object]) -> Outcome | None:
    """Return what the candidate of this very task came to; None where it is to be trained."""
    score = read_json(folder / worker.SCORE)
    if score is None:
        return None
    known, now = score["task"], json.loads(json.dumps(task))
    known["run"] = study.with_defaults(known["run"], now["run"])
    return outcome_from(score) if known == now else None


def _write(path: Path, values: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


# --- results ------------------------------------------------------------------------------------------------------


class _Measurement(NamedTuple):
    row: MethodRow
    scores: dict[str, Measured]
    """Its scores by metric; none where it failed."""


def _measurement(chosen_by: str, entry: _Entry) -> _Measurement:
    """Return a method's row, and its scores by metric."""
    contestant, runs = entry.contestant, entry.runs
    tried = [TriedRate.of(lr, outcome, chosen_by) for lr, outcome in entry.tried.items()]
    if not runs:
        best: BestRun | Failed = next(outcome for outcome in entry.tried.values() if isinstance(outcome, Failed))
        measured: dict[str, Measured] = {}
    else:
        first, seeds = runs[0], [run.seed for run in runs]
        measured = {
            name: measured_by([run.score.scores[name] for run in runs], seeds, name) for name in first.score.scores
        }
        scores = {name: over_seeds(first.score.scores[name], of_runs) for name, of_runs in measured.items()}
        best = BestRun(first.lr, first.score.figures, scores, first.score.valid)
    settings = dict(described(contestant.method))
    return _Measurement(MethodRow(contestant.name, contestant.kind, settings, tried, best), measured)


def _compared(measurements: Sequence[_Measurement], metric: str) -> list[Compared]:
    """Return the methods beside the best by this metric; of equals the smaller is the better."""
    by_name = _by_name(measurements, metric)
    return compared(by_name, more_is_better=metric in MORE_IS_BETTER) if len(by_name) > 1 else []


def _beside_full(measurements: Sequence[_Measurement], metric: str) -> list[Compared]:
    """Return the methods beside full fine-tuning by this metric; none where that has no score."""
    by_name = _by_name(measurements, metric)
    full = next((m.row.name for m in measurements if METHODS[m.row.method].trains_everything), None)
    if full not in by_name or len(by_name) < 2:
        return []
    return compared(by_name, more_is_better=metric in MORE_IS_BETTER, beside=full)


def _by_name(measurements: Sequence[_Measurement], metric: str) -> dict[str, Measured]:
    """Return the scores of the methods that have one, by name, the smallest method first."""

    def parameters(measurement: _Measurement) -> int:
        best = measurement.row.best
        return best.figures.parameters if isinstance(best, BestRun) else 0

    scored = sorted((m for m in measurements if m.scores), key=parameters)
    return {m.row.name: m.scores[metric] for m in scored if math.isfinite(m.scores[metric].value)}


def _latencies(work: _Work, entries: Sequence[_Entry]) -> list[LatencyRow]:
    """Time inference with each method's adapter, unless that is done already. A fully fine-tuned model is as fast as the base."""
    begun, options = work.begun, work.options
    timeable = [entry for entry in entries if entry.runs and not METHODS[entry.contestant.kind].trains_everything]
    trained = {entry.contestant.name: entry.runs[0].folder for entry in timeable}
    if not options.latency or not trained:
        return []
    timed = _QUICK_TIMED if options.quick else _TIMED
    task = TimingTask(
        model=begun.settings.model,
        dtype="float32" if begun.config.dtype == "auto" else begun.config.dtype,
        device=begun.config.device,
        adapters={name: str(RunFolder(folder / "run").adapter) for name, folder in trained.items()},
        trust_remote_code=begun.config.trust_remote_code,
        passes=timed.passes,
        decoding=timed.decoding,
        seconds=timed.seconds,
    ).to_json()
    kept = read_json(begun.folder / worker.LATENCY)
    if kept is None or kept["task"] != task:
        work.on_event(TimingStarted(list(trained)))
        _write(begun.folder / worker.TIMING, task)
        work.processes.do("timing", begun.folder, worker.LATENCY)
        kept = read_json(begun.folder / worker.LATENCY)
    assert kept is not None
    return [LatencyRow.from_json(row) for row in kept["rows"]]
