"""Ranks tried on a user's own model and data: every candidate trained over the one base that is in memory, scored on the same
test records, and the smallest rank that is enough, with what says so. Prints nothing; it emits events.

A sweep's folder holds data/ (the three sets of records), runs/ (a run folder for each candidate), results.json and report.html.
What is finished there is not trained again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from deltaw.config import GenerateConfig, SweepConfig, TrainConfig, check_is, to_mapping
from deltaw.data import read
from deltaw.errors import DeltaWError, TrainError
from deltaw.files import units
from deltaw.files.formats.atomic import write_text
from deltaw.methods.lora import LoRA
from deltaw.model import attach
from deltaw.model.inputs import hidden_size_of
from deltaw.model.pretrained import read_config
from deltaw.model.switch import use
from deltaw.progress import Runs, named, shown, tell
from deltaw.runs import splits, study
from deltaw.runs.candidates import Candidate, candidates, learning_rates, width_of
from deltaw.runs.directions import alike, in_common
from deltaw.runs.evaluation.bootstrap import (
    ERROR_RATE,
    Choice,
    Compared,
    Measured,
    chosen,
    compared,
    errors_of,
    of_losses,
)
from deltaw.runs.evaluation.card import Card
from deltaw.runs.evaluation.evaluate import Evaluation, RecordLosses, evaluate
from deltaw.runs.events import (
    CandidateFinished,
    CandidateStarted,
    CandidateStepped,
    LeftOut,
    RecordsRead,
    SweepEvent,
    WidthChosen,
)
from deltaw.runs.folder import finished, read_json
from deltaw.runs.memory import machine
from deltaw.runs.reports.sweep import sweep_report
from deltaw.runs.results import JsonObject
from deltaw.runs.results.directions import Alike
from deltaw.runs.results.scores import MetricScore, SeedScores, measured_by, over_seeds
from deltaw.runs.results.study import Failed, StudySettings
from deltaw.runs.results.sweep import (
    Behind,
    BestRun,
    Outcome,
    RunScore,
    SweepResults,
    SweepRow,
    TriedRate,
    outcome_from,
)
from deltaw.runs.resume.place import RunFolder
from deltaw.runs.study import Study, for_candidates
from deltaw.runs.train import RunResult, run_abreast
from deltaw.training.events import Evaluated, Event, Stepped
from deltaw.training.prepare import Prepared, prepare, usual_rate, with_head
from deltaw.training.tasks import task_of

# Where the worse half ends, if it is to: shares of the run
_RUNGS = (0.25, 0.5)


@dataclass(frozen=True, repr=False)
class Sweep(Card):
    """The result of `sweep`.

    >>> import deltaw
    >>> config = deltaw.TrainConfig(out="ranks", steps=1, valid_most=4, overwrite=True)
    >>> result = deltaw.sweep("model", "train.jsonl", config, deltaw.SweepConfig(ranks="2", targets="q", test_most=4))
    >>> (row,) = result.outcome.rows
    >>> row.name, row.best.parameters, sorted(row.best.scores)
    ('r = 2, q', 256, ['loss'])
    """

    folder: Path
    """The sweep's folder."""
    report: Path
    """The page about it."""
    outcome: SweepResults
    """A row for each candidate, the rank chosen for each choice of targets, and candidates beside the best."""

    @property
    def choices(self) -> dict[str, Choice]:
        """Targets → the smallest rank that is enough. One rank alone is no choice, and is not here."""
        return self.outcome.choices

    def card(self) -> tuple[str, dict[str, str]]:
        """Return what was tried on what, the ranks that are enough, the time and the place, in a few lines."""
        outcome, settings = self.outcome, self.outcome.settings
        rows = {targets: f"r = {choice.rank} is enough" for targets, choice in [*self.choices.items()][:3]}
        best = min(outcome.trained, key=lambda trained: trained[1].valid_loss, default=None)
        if best is not None:
            rows["best held-out loss"] = f"{best[1].valid_loss:.4f} of {best[0].name}, lr {best[1].lr:g}"
        failed = f", {len(outcome.failed)} of them without a result" if outcome.failed else ""
        seconds = sum(run.seconds for _, run in outcome.trained)
        rows["tried"] = (
            f"{len(outcome.rows)} candidates{failed}; the best of each took {units.duration(seconds)} in all"
        )
        return f"Sweep over {settings.model}, trained on {settings.data}", rows | {"report": str(self.report)}

    @property
    def results(self) -> JsonObject:
        """The plain values of results.json."""
        return self.outcome.to_json()


def sweep(
    model: str,
    data: str | Path,
    config: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
    options: SweepConfig = SweepConfig(),  # noqa: B008  (frozen)
    *,
    progress: bool = True,
    on_event: Callable[[SweepEvent], None] = lambda event: None,
) -> Sweep:
    """Train and score every rank of `options` over one base in memory, and write the report into `config.out`.

    Each candidate comes out as `train` alone makes it. A sweep of the same settings in the folder is resumed. A candidate whose
    loss is not finite is reported as failed.

    Args:
        model: a hub id, folder or GGUF file.
        data: a file, folder or hub data set, with records as `train` takes them.
        config: the settings of every run.
        options: the ranks and what else is tried.
        progress: show what goes on: a line that moves in a terminal and a notebook, plain lines on standard error elsewhere.
        on_event: called with what happens, as `deltaw.runs.events` has it.

    Returns:
        A row for each candidate, and the smallest rank that is enough, with its evidence.

    Raises:
        ConfigError: settings that do not fit each other, or another study in the folder. Nothing is trained.
        TargetError: targets that match no layer or do not fit a rank. Nothing is trained.
        DataError: records that cannot be used, or are too few. Nothing is trained.
        AdapterError: a width was asked for, and the model does not keep the rows of a batch apart.
        Interrupted: Ctrl-C. Finished runs are kept.

    >>> import deltaw
    >>> config = deltaw.TrainConfig(out="sweep", steps=1, valid_most=4, overwrite=True)
    >>> result = deltaw.sweep("model", "train.jsonl", config, deltaw.SweepConfig(ranks="2,1", targets="q", test_most=4))
    >>> [(row.rank, row.best.parameters) for row in result.outcome.rows]
    [(2, 256), (1, 128)]
    >>> result.choices["q"].rank in (1, 2)
    True
    """
    check_is(config, TrainConfig, "config")
    check_is(options, SweepConfig, "options")
    with (
        shown(progress, "sweep", on_event) as hear,
        _begun(model, data, for_candidates(config), options, hear) as begun,
    ):
        return _finished(begun)


def _finished(begun: _Begun) -> Sweep:
    """Train what is not trained yet, and write the results."""
    options, config, on_event = begun.options, begun.study.config, begun.on_event
    tried = candidates(options, begun.base.of(config.seed).loaded.model)
    for targets, why in tried.left_out.items():
        on_event(LeftOut(targets, why))
    measurements = _measured(begun, tried.candidates)
    choices = choices_of(measurements, options.margin, task_of(begun.study.scoring.data).least_margin)
    results = SweepResults(
        settings=begun.study.settings,
        options=to_mapping(options),
        environment=machine.describe(),
        chosen_by=begun.study.scoring.chosen_by,
        left_out=tried.left_out,
        sets=begun.study.scoring.sets,
        warnings=list(begun.study.scoring.warnings),
        rows=[measurement.row for measurement in measurements],
        choices=choices,
        compared=compared_of(measurements),
        alike=_alike(begun, measurements, choices),
    )
    begun.study.keep(results.to_json(), sweep_report(results))
    return Sweep(begun.study.folder, begun.study.report, results)


class _Base:
    """The one model in memory, and how many candidates share a pass over it."""

    def __init__(self, model: str, study: Study) -> None:
        self._model, self._study = model, study
        self._prepared: Prepared | None = None
        self._width: int | None = None

    def of(self, seed: int) -> Prepared:
        """Return the model with its encoded records. The seed draws a head that the checkpoint lacks, so that each seed then
        opens the model anew."""
        if self._prepared is None or (self._prepared.loaded.untrained and self._prepared.config.seed != seed):
            self._prepared = None  # one model at a time
            study = self._study
            config = dataclasses.replace(study.config, seed=seed, valid=study.records("valid"), data=study.scoring.data)
            self._prepared = prepare(self._model, study.records("train"), config, LoRA())
        return self._prepared

    @property
    def hidden_size(self) -> int | None:
        """The model's hidden size, as its config says."""
        return hidden_size_of(read_config(self._model, trust_remote_code=self._study.config.trust_remote_code))

    def width(self, asked: int | None, tasks: Sequence[Task], on_event: Callable[[SweepEvent], None]) -> int:
        """Return how many candidates share a pass. It is chosen once, for the first tasks, and then told."""
        if self._width is None:
            largest = max((task.candidate for task in tasks), key=lambda candidate: candidate.rank)
            prepared = dataclasses.replace(self.of(tasks[0].seed), method=largest.method)
            self._width, why = width_of(asked, prepared)
            on_event(WidthChosen(self._width, why))
        return self._width


@dataclass(frozen=True)
class _Begun:
    """A sweep whose folder is claimed and whose records are written."""

    study: Study
    options: SweepConfig
    base: _Base
    on_event: Callable[[SweepEvent], None]


@dataclass(frozen=True)
class Task:
    """One run of a candidate."""

    candidate: Candidate
    lr: float
    seed: int

    @property
    def named(self) -> str:
        """For people to read."""
        return f"{self.candidate.name}, lr {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Measurement:
    """A candidate's row of the results, with its losses on the test records."""

    row: SweepRow
    losses: Measured | None
    """None where it failed."""
    errors: Measured | None = None
    """Error rate of classes on the test records, where their accuracy was measured."""
    first: Task | None = None
    """The first seed's run with the best learning rate."""


@contextlib.contextmanager
def _begun(
    model: str, data: str | Path, config: TrainConfig, options: SweepConfig, on_event: Callable[[SweepEvent], None]
) -> Iterator[_Begun]:
    settings = StudySettings(
        model=model, data=str(data), test=options.test, test_most=options.test_most, valid=config.valid,
        run=study.shared_settings(config), halving=options.halving,
    )  # fmt: skip
    source = splits.Source(data, config.data.split, config.valid, options.test)
    with study.opened("sweep", settings, source, config, options.metrics) as opened:
        if opened.notes:
            on_event(RecordsRead(opened.notes))
        yield _Begun(opened, options, _Base(model, opened), on_event)


# --- candidates ---------------------------------------------------------------------------------------------------


def _measured(begun: _Begun, every: Sequence[Candidate]) -> list[Measurement]:
    """Train each candidate at all learning rates, then with the other seeds at its best one."""
    options, config = begun.options, begun.study.config
    usual = config.lr or _usual(begun, every[0].method)
    rates, seeds = learning_rates(options, usual), range(config.seed + 1, config.seed + options.seeds)
    tell(Runs(len(every) * (len(rates) + len(seeds))))
    first = _outcomes(
        begun, [Task(c, lr, config.seed) for c in every for lr in rates], _RUNGS if options.halving else ()
    )
    tried = {c: {lr: first[Task(c, lr, config.seed)] for lr in rates} for c in every}
    best = {c: _best_rate(begun.study, outcomes) for c, outcomes in tried.items()}
    more = _outcomes(begun, [Task(c, lr, seed) for seed in seeds for c, lr in best.items() if lr is not None])
    measurements = []
    for candidate, lr in best.items():
        tasks = [] if lr is None else [Task(candidate, lr, seed) for seed in (config.seed, *seeds)]
        runs = {task: outcome for task in tasks if isinstance(outcome := (first | more)[task], RunScore)}
        measurements.append(_measurement(begun.study, candidate, tried[candidate], runs))
    return measurements


def _usual(begun: _Begun, method: LoRA) -> float:
    """Return the learning rate that training a candidate alone takes."""
    study = begun.study
    with Path(study.records("train")).open("rb") as file:
        records = sum(1 for _ in file)
    config = dataclasses.replace(study.config, data=study.scoring.data)
    return usual_rate(method, begun.base.hidden_size, config, records)


def _best_rate(study: Study, outcomes: Mapping[float, Outcome]) -> float | None:
    """Return the best learning rate by the held-out records; None where no run came to its end."""
    scored = {lr: outcome for lr, outcome in outcomes.items() if isinstance(outcome, RunScore)}
    return min(scored, key=lambda lr: study.scoring.order(scored[lr].valid_loss, scored[lr].valid_scores), default=None)


def _outcomes(begun: _Begun, tasks: Sequence[Task], rungs: Sequence[float] = ()) -> dict[Task, Outcome]:
    """Return what each run came to, by training those that are not finished yet."""
    kept = {task: outcome for task in tasks if (outcome := _kept(begun, task)) is not None}
    for task, outcome in kept.items():
        begun.on_event(_finished_event(task, outcome, fresh=False))
    for seed in dict.fromkeys(task.seed for task in tasks):
        left = [task for task in tasks if task.seed == seed and task not in kept]
        for part in _portions(begun, left, all_at_once=bool(rungs)):
            kept |= _trained(begun, part, rungs)
    return kept


def _portions(begun: _Begun, tasks: Sequence[Task], *, all_at_once: bool) -> Iterator[Sequence[Task]]:
    """Yield the tasks in groups that are in memory together."""
    if not tasks:
        return
    width = begun.base.width(begun.options.abreast, tasks, begun.on_event)
    size = len(tasks) if all_at_once else width
    for i in range(0, len(tasks), size):
        yield tasks[i : i + size]


def _trained(begun: _Begun, tasks: Sequence[Task], rungs: Sequence[float]) -> dict[Task, Outcome]:
    """Train runs of one seed over the base, and keep what each came to."""
    base = begun.base.of(tasks[0].seed)
    width = begun.base.width(begun.options.abreast, tasks, begun.on_event)
    ready = []
    for task in tasks:
        config = dataclasses.replace(
            base.config, lr=task.lr, seed=task.seed, out=str(_folder(begun.study, task).path), overwrite=True
        )
        method = with_head(task.candidate.method, base.loaded.head)
        ready.append(dataclasses.replace(base, config=config, method=method))
        begun.on_event(CandidateStarted(task.candidate.name, task.lr, task.seed))

    def hear(number: int, event: Event) -> None:
        if isinstance(event, Stepped):
            task = tasks[number]
            begun.on_event(CandidateStepped(task.candidate.name, task.lr, task.seed, event))

    outcomes = {}
    names = {str(i): task.named for i, task in enumerate(tasks)}
    try:
        with named(lambda run: names.get(run, run)):
            results = run_abreast(ready, width, rungs=rungs, on_event=hear)
        for i, result in enumerate(results):
            use(base.loaded.model, str(i))
            outcomes[tasks[i]] = outcome = _outcome(begun.study, base, result)
            _keep(begun, tasks[i], outcome)
            begun.on_event(_finished_event(tasks[i], outcome, fresh=True))
    finally:
        attach.detach(base.loaded.model)
    return outcomes


def _outcome(study: Study, base: Prepared, result: RunResult | TrainError) -> Outcome:
    """Return what a run came to; its adapter is active on the base."""
    if isinstance(result, TrainError):
        return Failed(str(result))
    if result.state.stopped == "behind":
        assert result.state.valid_loss is not None
        return Behind(result.state.step, result.state.valid_loss)
    try:
        return _scored(study, base, result)
    except DeltaWError as error:  # its losses are not finite
        return Failed(str(error))


def _finished_event(task: Task, outcome: Outcome, *, fresh: bool) -> CandidateFinished:
    return CandidateFinished(task.candidate.name, task.lr, task.seed, outcome, fresh)


def _scored(study: Study, base: Prepared, result: RunResult) -> RunScore:
    """Score a trained adapter on the test records, and where a score chooses learning rates on the held-out ones."""
    outcome, state, scoring = result.outcome, result.state, study.scoring
    valid = [(event.step, event.valid_loss) for event in result.events if isinstance(event, Evaluated)]
    by = [scoring.chosen_by] if scoring.chosen_by != "loss" else []
    on_test = _evaluated(study, base, "test", {"loss", *scoring.metrics})
    assert on_test.losses is not None
    return RunScore(
        parameters=outcome.trainable_parameters,
        share=outcome.trainable_share,
        bytes=outcome.adapter_bytes,
        bytes_with_optimizer=outcome.bytes_with_optimizer,
        seconds=state.seconds,
        step_seconds=state.step_seconds / state.step,
        valid=valid,
        valid_loss=state.best_loss if study.config.patience else valid[-1][1],
        valid_scores={n: s.value for n, s in _evaluated(study, base, "valid", by).scores.items()} if by else {},
        scores={
            name: MetricScore.of(score, parts=name != "loss")
            for name, score in on_test.scores.items()
            if name in scoring.metrics
        },
        losses=on_test.losses,
    )


def _evaluated(study: Study, base: Prepared, part: str, metrics: Collection[str]) -> Evaluation:
    loaded, data, generation = base.loaded, base.config.data, GenerateConfig(batch=max(16, study.config.batch))
    records = read(study.records(part), data)
    return evaluate(loaded.model, loaded.tokenizer, records, data, generation, metrics=sorted(metrics))


# --- what is kept of a run ----------------------------------------------------------------------------------------


def _folder(study: Study, task: Task) -> RunFolder:
    targets = quote(task.candidate.targets, safe=",*")  # each its own folder, whatever the pattern
    return RunFolder(study.folder / "runs" / f"{targets}-r{task.candidate.rank}-{task.lr}-{task.seed}")


def _key(begun: _Begun, task: Task) -> JsonObject:
    """Return what decides about a run's result, as score.json has it."""
    method, metrics = to_mapping(task.candidate.method), list(begun.study.scoring.metrics)
    key = {"lr": task.lr, "seed": task.seed, "method": method, "kind": begun.options.method, "metrics": metrics}
    plain: JsonObject = json.loads(json.dumps(key))
    return plain


def _kept(begun: _Begun, task: Task) -> Outcome | None:
    """Return what the run came to where it is finished; None where it is to be trained."""
    score = read_json(_folder(begun.study, task).score)
    return None if score is None or score["task"] != _key(begun, task) else outcome_from(score)


def _keep(begun: _Begun, task: Task, outcome: Outcome) -> None:
    values = {"task": _key(begun, task), **outcome.to_json()}
    folder = _folder(begun.study, task)
    write_text(folder.score, json.dumps(values, ensure_ascii=False) + "\n")
    folder.forget_states()


# --- results ------------------------------------------------------------------------------------------------------


def _measurement(
    study: Study, candidate: Candidate, tried: Mapping[float, Outcome], runs: Mapping[Task, RunScore]
) -> Measurement:
    """Return a candidate's row. runs: those with the best learning rate, one a seed, the first seed's first."""
    rates = [TriedRate.of(lr, outcome) for lr, outcome in tried.items()]
    best: BestRun | Failed = _why_failed(list(tried.values()))
    losses = errors = task = None
    if runs:
        losses = losses_of([run.losses for run in runs.values()], [task.seed for task in runs])
        if "accuracy" in study.scoring.metrics:
            accuracies = [run.scores["accuracy"] for run in runs.values()]
            errors = errors_of(measured_by(accuracies, [task.seed for task in runs], "accuracy"))
        task, first = next(iter(runs.items()))
        best = BestRun(
            lr=task.lr, parameters=first.parameters, share=first.share, bytes=first.bytes,
            bytes_with_optimizer=first.bytes_with_optimizer, step_seconds=first.step_seconds, seconds=first.seconds,
            valid=first.valid, valid_loss=first.valid_loss, folder=str(_folder(study, task).path),
            scores=_over_seeds(runs, losses),
        )  # fmt: skip
    row = SweepRow(candidate.name, candidate.targets, candidate.rank, candidate.alpha, rates, best)
    return Measurement(row, losses, errors, task)


def _why_failed(outcomes: Sequence[Outcome]) -> Failed:
    """Return the first error, or where all were ended among the worse half, when."""
    steps = [outcome.step for outcome in outcomes if isinstance(outcome, Behind)]
    behind = f"was among the worse half of the candidates at step {max(steps, default=0)}, and ended there"
    return next((outcome for outcome in outcomes if isinstance(outcome, Failed)), Failed(behind))


def _over_seeds(runs: Mapping[Task, RunScore], losses: Measured) -> dict[str, SeedScores]:
    first, seeds = next(iter(runs.values())), [task.seed for task in runs]
    scores = {}
    for metric, score in first.scores.items():
        of_runs = (
            losses if metric == "loss" else measured_by([run.scores[metric] for run in runs.values()], seeds, metric)
        )
        scores[metric] = over_seeds(score, of_runs)
    return scores


def losses_of(losses: Sequence[RecordLosses], seeds: Sequence[int]) -> Measured:
    """Return the loss of one candidate from its runs' losses on the same records, one run a seed."""
    sums, counts, items = (np.array([getattr(run, part) for run in losses]) for part in RecordLosses._fields)
    return of_losses(sums, counts[0], items[0], seeds)


def choices_of(measurements: Sequence[Measurement], margin: float, least: float) -> dict[str, Choice]:
    """Return the rank that is enough, by targets of which several ranks were trained: by the error rate of classes, else by the
    loss."""
    trained = [m for m in measurements if m.losses is not None]
    by = ERROR_RATE if trained and all(m.errors is not None for m in trained) else "loss"
    by_targets: dict[str, dict[int, Measured]] = {}
    for measurement in trained:
        figures = measurement.errors if by == ERROR_RATE else measurement.losses
        if figures is not None:
            by_targets.setdefault(measurement.row.targets, {})[measurement.row.rank] = figures
    return {targets: chosen(of, margin, least, by=by) for targets, of in by_targets.items() if len(of) > 1}


def compared_of(measurements: Sequence[Measurement]) -> list[Compared]:
    """Return the candidates beside the best one; none where they all have the same targets."""
    scored = {m.row.name: m.losses for m in measurements if m.losses is not None}
    targets = {m.row.targets for m in measurements if m.losses is not None}
    return compared(scored) if len(targets) > 1 else []


def _alike(begun: _Begun, measurements: Sequence[Measurement], choices: Mapping[str, Choice]) -> list[Alike]:
    """Compare the directions of the largest rank, for each choice of targets, with the chosen rank's (or the next smaller one's,
    where the largest is chosen), and with its own from another seed."""
    pairs = []
    for targets, choice in choices.items():
        tasks = {m.row.rank: m.first for m in measurements if m.row.targets == targets and m.first is not None}
        *smaller, largest = sorted(tasks)
        other = choice.rank if choice.rank != largest else smaller[-1]
        others = [(f"r = {other}", _folder(begun.study, tasks[other]))]
        again = _folder(begun.study, dataclasses.replace(tasks[largest], seed=tasks[largest].seed + 1))
        if begun.options.seeds > 1 and again.score.is_file():
            others.append((f"r = {largest} of another seed", again))
        one = finished(_folder(begun.study, tasks[largest]).path)
        for name, folder in others:
            second = finished(folder.path)
            if in_common(one, second):
                pairs.append(alike(one, second, name, targets=targets))
    return pairs
