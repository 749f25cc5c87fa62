"""One training run from end to end: model, records, loop, samples, run folder. Prints nothing; it emits events.

A run folder holds adapter/ (PEFT format), config.yaml (reproduces the run), log.jsonl, result.json and report.html.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaw.config import GenerateConfig, TrainConfig, to_mapping, to_yaml
from deltaw.data import Record, as_said
from deltaw.errors import ConfigError, DeltaWError, Interrupted, NotFinite, TrainError
from deltaw.files import store
from deltaw.files.formats.atomic import check_apart, write_text
from deltaw.layers.ops.seeding import seeded
from deltaw.layers.tree import evaluating, is_finite, not_finite_in
from deltaw.methods.lora import LoRA
from deltaw.methods.plan import Method
from deltaw.methods.registry import name_of
from deltaw.model import attach
from deltaw.model import summary as sizes
from deltaw.model.ends import teach
from deltaw.model.merging.merge import preview
from deltaw.model.merging.report import MergeReport
from deltaw.model.summary import Summary, parameters, updates
from deltaw.model.switch import base_not_finite, use, using
from deltaw.runs.memory.expected import expected
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.reports.train import Sampled, run_report
from deltaw.runs.results import JsonObject
from deltaw.runs.results.train import RunFigures
from deltaw.runs.resume.asked import Asked
from deltaw.runs.resume.identity import LENGTHS, check_same, differing, identity
from deltaw.runs.resume.journal import Journal
from deltaw.runs.resume.place import (
    RunFolder,
    at_work,
    begin,
    check_free,
    clear,
    copy_log,
    finish_replacing,
    put_in_place,
)
from deltaw.runs.resume.signals import Stopping, asked_to_stop
from deltaw.training.abreast import run_loops
from deltaw.training.events import Event, Resumed, Started, Warned
from deltaw.training.keeper import Keeper, Kept, Place, read_states
from deltaw.training.loop import LoopPlan, LoopState, Saved, opened, peak_memory, run_loop
from deltaw.training.optim import ADAM_STATE
from deltaw.training.prepare import Prepared, prepare
from deltaw.training.tasks import task_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

log = logging.getLogger("deltaw")
# Long enough for people to see what an adapter changes
_SAMPLE = GenerateConfig(max_new_tokens=96)


@dataclass(frozen=True)
class RunResult:
    """The result of a training run.

    >>> import deltaw
    >>> config = deltaw.TrainConfig(out="result", steps=2, samples=0, overwrite=True)
    >>> result = deltaw.train("model", "train.jsonl", config, method=deltaw.LoRA(rank=2))
    >>> result.state.step, result.outcome.trainable_parameters, result.outcome.unit
    (2, 1952, 'nats per supervised token')
    >>> sorted(path.name for path in result.folder.iterdir())
    ['adapter', 'config.yaml', 'log.jsonl', 'report.html', 'result.json', 'state.safetensors']
    """

    folder: Path
    """The run's folder."""
    adapter: Path
    """The adapter's folder in it, in PEFT format."""
    report: Path
    """The page about the run."""
    model: nn.Module
    """The model with the trained adapter attached, active, as "default"."""
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor
    """The model's tokenizer; of a model of images its image processor."""
    settings: dict[str, object]
    """The settings in config.yaml."""
    summary: Summary
    """Sizes of the base and of the adapter."""
    merge: MergeReport
    """Figures of a merge into the base, in the dtype that it was trained on."""
    samples: list[Sampled]
    """Held-out records with what the base and the adapter say to them."""
    events: list[Event]
    """All that happened, one event a line of log.jsonl."""
    outcome: RunFigures
    """The figures in result.json."""

    @property
    def state(self) -> LoopState:
        """The state in which the loop ended: steps, seconds, losses, and why it stopped."""
        return self.outcome.loop

    @property
    def data(self) -> dict[str, int]:
        """Counts of the training records: kept, truncated, dropped, tokens …"""
        return self.outcome.data

    @property
    def sets(self) -> dict[str, str | None]:
        """The content of train and of valid, for example "300 records of 47 prompts", and their overlap in words."""
        return self.outcome.sets

    @property
    def warnings(self) -> list[str]:
        """The warnings, in the order in which they came."""
        return self.outcome.warnings

    @property
    def peak_memory(self) -> int:
        """Bytes: the most that the process has held, on the GPU where one is in use."""
        return self.outcome.peak_memory

    @property
    def log(self) -> list[JsonObject]:
        """The lines of log.jsonl as plain values."""
        return [event.to_json() for event in self.events]

    def figures(self) -> JsonObject:
        """Return the plain values of result.json."""
        return self.outcome.to_json()


def train(
    model: str | Path | nn.Module | None = None,
    data: str | Path | Sequence[Mapping[str, object]] | Dataset | None = None,
    config: TrainConfig | None = None,
    *,
    method: Method | None = None,
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
    resume: str | Path | None = None,
    resume_with: Sequence[str] = (),
    on_event: Callable[[Event], None] = lambda event: None,
) -> RunResult:
    """Train an update of a model and write the run folder `config.out`.

    A run that is resumed ends with the same bits as one without a break, on one machine. A run that is there is replaced, with
    `config.overwrite`, once the new one is whole; until then the new one lies in its folder next/.

    Args:
        model: a hub id, a folder, a GGUF file, or a loaded model.
        data: a file, folder, hub data set or list of records to train on.
        config: the settings of training and of the records. Default: `TrainConfig()`.
        method: what is trained: `LoRA`, `DoRA`, `IA3` … Default: `LoRA()`.
        tokenizer: of a loaded model, which needs one.
        resume: a run folder whose run goes on from its last state, or whose finished run is trained further, for other epochs,
            steps or minutes. What is not given is as the run was begun.
        resume_with: settings of which the resumed run has others: epochs, steps, minutes, patience, out.
        on_event: called with every logged step, evaluation and warning, as `deltaw.training.events` has them.

    Returns:
        The run's folder and figures, and the model with the trained adapter attached as "default".

    Raises:
        ConfigError: settings that do not fit each other or the run to resume, a run folder that is not empty, or one that another
            process trains into. Nothing is trained.
        FileError: a model or a state that cannot be read. Nothing is trained.
        TargetError: targets that match no layer. Nothing is trained.
        DataError: records that cannot be used, all of them named. Nothing is trained.
        TrainError: a loss that is not finite. What was learned until then is in the run folder.
        Interrupted: Ctrl-C, or SIGTERM. The state is saved: the run can be resumed.

    >>> import deltaw
    >>> config = deltaw.TrainConfig(out="run", steps=3, lr=1e-2, samples=0, overwrite=True)
    >>> result = deltaw.train("model", "train.jsonl", config, method=deltaw.LoRA(rank=4, targets="q,v"))
    >>> result.state.step, result.state.stopped, result.adapter.name
    (3, '', 'adapter')
    >>> deltaw.adapters(result.model).active
    'default'
    >>> longer = deltaw.TrainConfig(out="run", steps=5, lr=1e-2, samples=0)
    >>> deltaw.train(config=longer, resume="run").state.step
    5
    """
    if resume is not None:
        asked = Asked(Path(resume), model, data, config, method, tokenizer, tuple(resume_with))
        return _resumed(asked, on_event)
    if model is None or data is None:
        raise ConfigError("train needs a model and data, or a run to resume.")
    config = config or TrainConfig()
    home = RunFolder(Path(config.out))
    check_apart(
        home.path,
        {"the base": model, "the data": data, "the held-out records": config.valid, "the start": config.start},
    )
    with at_work(home) as notes:
        check_free(home, overwrite=config.overwrite)
        prepared = prepare(model, data, config, method or LoRA(), tokenizer=tokenizer)
        job = _attached(prepared, "default", begin(home))
        return _run(replace(job, notes=notes), home, on_event)


def _resumed(asked: Asked, on_event: Callable[[Event], None]) -> RunResult:
    """Go on with a run from its last state, or from its beginning where it died before the first one."""
    home = RunFolder(asked.folder)
    with at_work(home) as notes:
        finish_replacing(home)
        there = home.latest
        begun = asked.settled(there)
        states = read_states(there.path)
        prepared = prepare(begun.model, begun.data, begun.config, begun.method, tokenizer=asked.tokenizer)
        job = _attached(prepared, "default", there)
        if states:
            job = _going_on(job, states[0], asked)
        job = replace(job, notes=(*notes, *job.notes))
        new_home = RunFolder(Path(begun.config.out))
        if new_home.path.resolve() == home.path.resolve():
            return _run(job, home, on_event)
        with at_work(new_home):
            check_free(new_home, overwrite=begun.overwrite)
            moved = begin(new_home)
            copy_log(there, moved)
            return _run(replace(job, folder=moved), new_home, on_event)


def _going_on(job: _Job, kept: Kept, asked: Asked) -> _Job:
    """Return the job as it goes on from a state. Raises ConfigError where the state is of another run."""
    saved = kept.saved
    notes = check_same(kept.about, job.identity, asked.folder, may_change=asked.resume_with, finished=saved.has_ended)
    before, now = kept.about["settings"], job.identity["settings"]
    if saved.has_ended and any(before[key] != now[key] for key in LENGTHS):
        saved = saved.reopened()
    return replace(job, kept=replace(kept, saved=saved), notes=(*kept.notes, *notes))


def _run(job: _Job, home: RunFolder, on_event: Callable[[Event], None]) -> RunResult:
    """Train what was prepared. The adapter stays attached as "default". home: where the run is in the end."""
    with asked_to_stop() as stopping, _recorded(job, on_event) as journal:
        chosen = _records_to_answer(job)
        before = _answers(job, chosen, None)
        state = _train(job, journal, stopping)
        if stopping():
            chosen, before = [], []  # there is no time for samples
        samples = _samples(job, chosen, before, _answers(job, chosen, job.adapter))
        return _finished(job, journal, state, samples, home)


def run_abreast(
    prepared: Sequence[Prepared],
    width: int,
    *,
    rungs: Sequence[float] = (),
    on_event: Callable[[int, Event], None] = lambda number, event: None,
) -> list[RunResult | TrainError]:
    """Train several runs that were prepared over one model. Runs that were begun together before go on from their states.

    Args:
        prepared: the runs, each with a folder of its own. Their adapters stay attached, as "0", "1" …, the last one active.
        width: how many of them share a pass at most.
        rungs: where the worse half ends (see `run_loops`).
        on_event: called with the number of a run and its event.

    Returns:
        What each run came to. A loss that is not finite ends its own run alone.

    Raises:
        Interrupted: Ctrl-C or SIGTERM. The states are saved.
    """
    together = [width, *rungs, *(Path(of_run.config.out).name for of_run in prepared)]
    attached = [_attached(p, str(i), RunFolder(Path(p.config.out)), together) for i, p in enumerate(prepared)]
    jobs = _going_on_together(attached)
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(asked_to_stop())
        journals = [stack.enter_context(_recorded(job, partial(on_event, i))) for i, job in enumerate(jobs)]
        plans = [_plan(job, journal, stopping) for job, journal in zip(jobs, journals, strict=True)]
        starts = [job.kept.saved for job in jobs if job.kept is not None]
        ended = run_loops(plans, width, rungs, starts=starts, keep=_keeper(jobs, journals))
        if any(state.stopped == "interrupted" for state in ended.states):
            raise Interrupted("Stopped. The same command goes on from here.", exit_code=stopping.exit_code)
        return [
            ended.failed.get(job.adapter) or _saved_and_finished(job, journal, state)
            for job, journal, state in zip(jobs, journals, ended.states, strict=True)
        ]


def _going_on_together(jobs: Sequence[_Job]) -> Sequence[_Job]:
    """Return the jobs as they go on from states after one step, where all have such states of the same runs; else as they are."""
    try:
        states = [read_states(job.folder.path) for job in jobs]
        for step in sorted({kept.saved.step for of_job in states for kept in of_job}, reverse=True):
            chosen = [next((kept for kept in of_job if _is_at(kept.saved, step)), None) for of_job in states]
            if all(_goes_on(kept, job) for kept, job in zip(chosen, jobs, strict=True)):
                return [_continued(job, kept) for job, kept in zip(jobs, chosen, strict=True) if kept is not None]
    except DeltaWError as error:
        log.info("Runs that were begun before are trained anew: %s", error)
    return jobs


def _goes_on(kept: Kept | None, job: _Job) -> bool:
    """Return whether a job can go on from a state: one of the same runs together, or one that had come to its end."""
    return kept is not None and (kept.saved.has_ended or kept.about["together"] == list(job.together))


def _continued(job: _Job, kept: Kept) -> _Job:
    """Return one of several jobs as it goes on from a state. Raises ConfigError where the state is of another run."""
    notes = check_same(kept.about, job.identity, job.folder.path, may_change=(), finished=False)
    return replace(job, kept=kept, notes=tuple(notes))


def _is_at(saved: Saved, step: int) -> bool:
    """Return whether a loop was at this step, or had ended before it."""
    return saved.step == step or (saved.has_ended and saved.step < step)


@dataclass(frozen=True)
class _Job:
    """A run whose adapter is attached."""

    prepared: Prepared
    folder: RunFolder
    """The folder of its files while it is trained."""
    adapter: str
    """The adapter's name on the model."""
    settings: dict[str, object]
    """The settings in config.yaml."""
    identity: dict[str, Any]
    """Settings, base and records, without which its state does not go on."""
    together: Sequence[object] = ()
    """The runs that are trained over the model at once, which share passes."""
    kept: Kept | None = None
    """The state to go on from."""
    notes: tuple[str, ...] = ()
    """Sentences to tell as it begins."""

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self.prepared.loaded.model
        return model


def _attached(prepared: Prepared, name: str, folder: RunFolder, together: Sequence[object] = ()) -> _Job:
    """Attach the adapter, drawn from the run's seed, and teach it the tokens that end its records."""
    model, config, settings = prepared.loaded.model, prepared.config, _settings(prepared)
    known = identity(prepared, settings)
    with seeded(config.seed):
        attach.attach(model, prepared.method, name=name)
    teach(model, name, prepared.encoded.ends)
    return _Job(prepared, folder, name, settings, known, together)


def _settings(prepared: Prepared) -> dict[str, object]:
    """Return what config.yaml holds: the command's own keys, so that `deltaw train --config` takes it as it is."""
    source, count = prepared.source, len(prepared.encoded.examples)
    data = source if isinstance(source, (str, Path)) else f"<{count} records in memory>"
    named = {"model": prepared.loaded.name, "data": str(data), "method": name_of(prepared.method)}
    return {**named, **to_mapping(prepared.method), **to_mapping(prepared.config)}


@contextlib.contextmanager
def _recorded(job: _Job, on_event: Callable[[Event], None]) -> Iterator[Journal]:
    """Keep the run's log, while open. It begins with what will be trained; a resumed run's goes on."""
    use(job.model, job.adapter)
    folder, kept = job.folder, job.kept
    if kept is None:
        _begin_with(job)
        clear(folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.config, to_yaml(job.settings))
    with contextlib.closing(Journal(folder.log, on_event, kept.about["log_bytes"] if kept else 0)) as journal:
        if kept is None:
            for text in job.notes:
                journal.pass_on(Warned(0, text))
            for event in _opening_events(job):
                journal.hear(event)
        else:
            for event in journal.events[:1]:
                journal.pass_on(event)
            journal.pass_on(Resumed(kept.saved.step, [*job.notes, *filter(None, [journal.note])]))
        yield journal


def _begin_with(job: _Job) -> None:
    """Give the adapter the values of the one that the run is to begin with. Raises ConfigError where they are of other shapes."""
    start = job.prepared.config.start
    if start is None:
        return
    name = store.load(job.model, start, name=f"{job.adapter} begins with", activate=False)
    try:
        source, target = (_values(job.model, adapter) for adapter in (name, job.adapter))
        sizes, asked = ({key: (tuple(t.shape), scale) for key, (t, scale) in v.items()} for v in (source, target))
        if problems := differing(sizes, asked):
            raise ConfigError(
                f"The run cannot begin with {start}:",
                problems,
                "Give it the adapter's method, --rank, --alpha and --targets.",
            )
        with torch.no_grad():
            for key, (tensor, _) in target.items():
                tensor.copy_(source[key][0])
    finally:
        attach.detach(job.model, name)


def _values(model: nn.Module, name: str) -> dict[str, tuple[nn.Parameter, float | None]]:
    """Return layer and name of each trained tensor of an adapter → the tensor, and the scale of its update."""
    return {
        f"{layer} {key}": (tensor, getattr(update, "scale", None))
        for layer, update in updates(model, name).items()
        for key, tensor in update.named_parameters()
    }


def _opening_events(job: _Job) -> Iterator[Event]:
    """Yield what will be trained, and what is worth a warning beforehand."""
    prepared, task = job.prepared, task_of(job.prepared.config.data)
    summary = sizes.summary(job.model)
    adapter, memory = summary.adapters[job.adapter], expected(prepared)
    yield Started(
        0, layers=adapter.layers, parameters=adapter.parameters, share=adapter.share, left_out=adapter.left_out,
        coverage=adapter.coverage.lines(), task=task.name, counted=task.counted, labels=prepared.config.data.labels,
        data=prepared.encoded.counts, base_bytes=summary.base_bytes, sets=prepared.sets,
        expected_memory=None if memory is None else memory.figures(),
    )  # fmt: skip
    if prepared.sets.overlap is not None:
        yield Warned(0, prepared.sets.overlap)
    if memory is not None and memory.missing:
        yield Warned(0, memory.warning())
    if prepared.encoded.note:
        yield Warned(0, prepared.encoded.note)


# --- the loop -----------------------------------------------------------------------------------------------------


def _plan(job: _Job, journal: Journal, stopping: Callable[[], bool]) -> LoopPlan:
    """Return the plan of the run's loop. stopping: says whether it was asked to stop."""
    prepared = job.prepared
    return LoopPlan(
        task_of(prepared.config.data).loss(prepared.loaded),
        prepared.encoded.examples,
        prepared.valid.examples if prepared.valid else (),
        prepared.config,
        on_event=journal.hear,
        should_stop=stopping,
        adapter=job.adapter,
    )


def _keeper(jobs: Sequence[_Job], journals: Sequence[Journal]) -> Keeper:
    """Return what writes the states of the runs. A state that cannot be written is a warning in each log."""

    def tell(text: str) -> None:
        for journal in journals:
            journal.hear(Warned(journal.events[-1].step, text))

    both = zip(jobs, journals, strict=True)
    places = {job.adapter: Place(job.folder.path, partial(_about, job, journal)) for job, journal in both}
    return Keeper(places, every=jobs[0].prepared.config.save_every, on_error=tell)


def _about(job: _Job, journal: Journal) -> dict[str, Any]:
    """Return what stands in a state about its run."""
    of_log = {"log_bytes": journal.position(), "peak_memory": _peak(job), "resumed": _resumed_at(job)}
    return {**job.identity, "together": list(job.together), **of_log}


def _peak(job: _Job) -> int:
    """Return the most bytes that the run has held, in whatever process."""
    return max(peak_memory(), job.kept.about["peak_memory"] if job.kept else 0)


def _resumed_at(job: _Job) -> list[int]:
    """Return the steps after which the run was resumed."""
    return [*job.kept.about["resumed"], job.kept.saved.step] if job.kept else []


def _train(job: _Job, journal: Journal, stopping: Stopping) -> LoopState:
    """Run the loop and save the adapter, however the loop ends. Raises Interrupted where it was asked to stop, and TrainError."""
    adapter = job.folder.adapter
    plan, state = _plan(job, journal, stopping), LoopState()
    start = job.kept.saved if job.kept else None
    try:
        run_loop(plan, state, start=start, keep=_keeper([job], [journal]))
    except NotFinite as error:
        raise _with_what_was_good(job, plan, error) from error
    except BaseException as error:
        if _values_are_finite(job):
            _save(job, state.step)
        if _out_of_memory(error):
            raise TrainError(
                f"Out of memory after {state.step} steps. The adapter so far is in {adapter}.\n"
                "Try --micro-batch 1 (or another part of --batch), --gradient-checkpointing, a smaller --max-length, "
                "or --dtype bfloat16."
            ) from error
        raise
    _save(job, state.step)
    if state.stopped == "interrupted":
        raise Interrupted(
            f"Stopped after step {state.step} of {plan.total_steps}. Its state is saved: go on with\n"
            f"  deltaw train --resume {job.settings['out']}\n"
            f"The adapter so far is in {adapter}.",
            exit_code=stopping.exit_code,
        )
    return state


def _with_what_was_good(job: _Job, plan: LoopPlan, error: NotFinite) -> DeltaWError:
    """Save the last values of the adapter with which the bad step's records have a finite loss, if there are any.

    Returns the error, with what was saved; one of the base, where that is damaged or gives no finite loss from the first step on.
    """
    rows, folder = plan.drawn(error.step), job.folder.adapter
    base_is_sound = _gives_finite_loss(job, plan, rows, None)
    if not base_is_sound and (error.step == 0 or not_finite_in(job.model)):
        return base_not_finite(job.model, job.prepared.loaded.name)
    step: int | None = error.step if _values_are_finite(job) else None
    if base_is_sound:
        step = _last_good(job, plan, rows, error.step)
    if step is None:
        return NotFinite(f"{error}\nNo adapter was saved: none of its values so far are good.", step=error.step)
    _save(job, step)
    with_base = "" if base_is_sound else " The base alone gives no finite loss with these records either: look at them."
    return NotFinite(
        f"{error}{with_base}\nThe adapter after step {step}, the last good one, is in {folder}.", step=error.step
    )


def _values_are_finite(job: _Job) -> bool:
    return all(is_finite(p) for p in parameters(job.model, job.adapter))


def _last_good(job: _Job, plan: LoopPlan, rows: Sequence[Any], step: int) -> int | None:
    """Give the adapter the last values, its own or a saved state's, with which these records have a finite loss.

    Returns the steps after which it had them; None where there are none.
    """
    if _gives_finite_loss(job, plan, rows, job.adapter):
        return step
    for kept in read_states(job.folder.path):
        with opened(replace(plan, valid=(), on_event=lambda event: None), LoopState(), kept.saved):
            pass  # on leaving, the adapter holds the state's values
        if kept.saved.step and _gives_finite_loss(job, plan, rows, job.adapter):
            return kept.saved.step
    return None


def _gives_finite_loss(job: _Job, plan: LoopPlan, rows: Sequence[Any], adapter: str | None) -> bool:
    """Return whether the records' loss is finite, with the adapter or the base alone."""
    if adapter is not None and not _values_are_finite(job):
        return False
    with using(job.model, adapter), torch.no_grad(), evaluating(job.model):
        return all(bool(plan.loss(plan.loss.collate(part))[0].isfinite()) for part in plan.parts(rows))


def _out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: a CPU's allocator raises a plain RuntimeError."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))


# --- what is kept -------------------------------------------------------------------------------------------------


def _save(job: _Job, step: int) -> None:
    """Save the adapter as it is after `step` steps."""
    loaded = job.prepared.loaded
    tokenizer = loaded.tokenizer if loaded.handed_over else None
    store.save(
        job.model,
        job.folder.adapter,
        name=job.adapter,
        training=job.settings | {"steps_taken": step},
        tokenizer=tokenizer,
    )


def _saved_and_finished(job: _Job, journal: Journal, state: LoopState) -> RunResult:
    """Save one of several runs over a model, and write what it came to."""
    use(job.model, job.adapter)
    _save(job, state.step)
    return _finished(job, journal, state, [])


def _finished(
    job: _Job, journal: Journal, state: LoopState, samples: list[Sampled], home: RunFolder | None = None
) -> RunResult:
    """Write result.json and the report of a run whose adapter is saved and active, and put it in its place.

    home: where the run is in the end; where it was trained, if there is none.
    """
    summary, merge = sizes.summary(job.model), preview(job.model)
    outcome = _figures(job, journal.events, state, summary, merge)
    write_report(run_report(job.settings, outcome, journal.events, samples), job.folder.report)
    write_text(job.folder.result, json.dumps(outcome.to_json(), indent=2, ensure_ascii=False) + "\n")
    folder = job.folder if home is None or home.path == job.folder.path else put_in_place(home)
    return RunResult(
        folder=folder.path,
        adapter=folder.adapter,
        report=folder.report,
        model=job.model,
        tokenizer=job.prepared.loaded.tokenizer,
        settings=job.settings,
        summary=summary,
        merge=merge,
        samples=samples,
        events=journal.events,
        outcome=outcome,
    )


def _figures(job: _Job, events: Sequence[Event], state: LoopState, summary: Summary, merge: MergeReport) -> RunFigures:
    adapter, task = summary.adapters[job.adapter], task_of(job.prepared.config.data)
    size = sum(file.stat().st_size for file in job.folder.adapter.iterdir())
    return RunFigures(
        loop=state,
        trainable_parameters=adapter.parameters,
        trainable_share=adapter.share,
        adapter_bytes=size,
        bytes_with_optimizer=size + ADAM_STATE * adapter.parameters,
        base_bytes=summary.base_bytes,
        unit=task.unit,
        counted=task.counted,
        relative_norm=merge.relative,
        merge_dtype=str(next(job.model.parameters()).dtype).removeprefix("torch."),
        merge_rows=merge.rows(),
        peak_memory=_peak(job),
        resumed=_resumed_at(job),
        data=dataclasses.asdict(job.prepared.encoded.counts),
        sets=dataclasses.asdict(job.prepared.sets),
        warnings=[event.text for event in events if isinstance(event, Warned)],
    )


# --- samples ------------------------------------------------------------------------------------------------------


def _records_to_answer(job: _Job) -> list[Record]:
    """Return held-out records with different prompts, of which the wanted answer is known and for which there is room."""
    config, task, loaded = job.prepared.config, task_of(job.prepared.config.data), job.prepared.loaded
    chosen: dict[object, Record] = {}
    for record in job.prepared.valid_records.items if job.prepared.valid_records is not None else ():
        known = task.wanted(record, config.data) is not None and record.form != "text"
        if known and len(chosen) < config.samples and task.fits(loaded, record, config.data, _SAMPLE):
            chosen.setdefault(record.context, record)
    return list(chosen.values())


def _answers(job: _Job, records: Sequence[Record], adapter: str | None) -> list[str | None]:
    """Return what is said to each record by the adapter, or by the base: nothing where its head is untrained."""
    loaded, data = job.prepared.loaded, job.prepared.config.data
    if not records or (adapter is None and loaded.untrained):
        return [None] * len(records)
    task = task_of(data)
    with using(job.model, adapter):
        answers = task.answer(loaded, records, data, _SAMPLE, lambda count: None)
    return [task.said(answer, data) for answer in answers]


def _samples(
    job: _Job, records: Sequence[Record], before: Sequence[str | None], after: Sequence[str | None]
) -> list[Sampled]:
    """Return the records with what was wanted, and what the base and the adapter said."""
    task, data = task_of(job.prepared.config.data), job.prepared.config.data
    wanted: Sequence[str | None] = [task.wanted(record, data) for record in records]
    if task.answers == "text":
        wanted = as_said([text or "" for text in wanted], job.prepared.loaded.tokenizer)
    rows = zip(records, wanted, before, after, strict=True)
    return [Sampled(record.question, reference, base, adapter) for record, reference, base, adapter in rows]
