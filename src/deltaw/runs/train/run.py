"""Train: one run, one that is resumed, or several over one model. Prints nothing; it emits events."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaw.config import LATEST, TrainConfig, check_is, to_yaml
from deltaw.data.sources import Source
from deltaw.errors import ConfigError, DeltaWError, FileError, Interrupted, NotFinite, TrainError
from deltaw.files.formats.atomic import check_apart, write_text
from deltaw.layers.processes.ranks import Lost, Ranks, joined
from deltaw.methods.lora import LoRA
from deltaw.methods.plan import Method
from deltaw.model import summary as sizes
from deltaw.model.merging.merge import preview
from deltaw.model.switch import use
from deltaw.progress import say, shown
from deltaw.runs.memory.expected import expected
from deltaw.runs.reports.train import Sampled
from deltaw.runs.results.train import HeldOutScores
from deltaw.runs.resume.asked import Asked
from deltaw.runs.resume.identity import LENGTHS, check_same
from deltaw.runs.resume.journal import Journal
from deltaw.runs.resume.place import (
    RunFolder,
    at_work,
    begin,
    check_free,
    clear,
    copy_log,
    dated,
    finish_replacing,
    name_latest,
)
from deltaw.runs.resume.signals import Stopping, asked_to_stop
from deltaw.runs.train.job import Job, attached, begin_with, deal_out, peak, resumed_at, save, values_are_finite
from deltaw.runs.train.rescue import with_what_was_good
from deltaw.runs.train.result import RunResult, finished
from deltaw.runs.train.samples import answering, answers, records_to_answer, sampled, scores
from deltaw.runs.train.tracking import both, tracked, trackers_of
from deltaw.training.abreast import run_loops
from deltaw.training.events import Event, Resumed, Started, Warned
from deltaw.training.keeper import Keeper, Kept, Place, go_on_from, read_states
from deltaw.training.loop import LoopPlan, LoopState, Saved, run_loop
from deltaw.training.loop.alike import alike
from deltaw.training.prepare import Model, Prepared, Tokenizer, prepare
from deltaw.training.tasks import task_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

log = logging.getLogger("deltaw")


def train(
    model: str | Path | nn.Module | None = None,
    data: str | Path | Sequence[Mapping[str, object]] | Dataset | None = None,
    config: TrainConfig | None = None,
    *,
    method: Method | None = None,
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
    resume: str | Path | None = None,
    resume_with: Sequence[str] = (),
    progress: bool = True,
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
        progress: show what goes on: a line that moves in a terminal and a notebook, plain lines on standard error elsewhere.
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
    check_is(config or TrainConfig(), TrainConfig, "config")
    check_is(method or LoRA(), Method, "method")
    with joined() as ranks, shown(progress and ranks.is_first, "training", on_event) as hear:
        if resume is not None:
            asked = Asked(Path(resume), model, data, config, method, tokenizer, tuple(resume_with))
            return _resumed(asked, hear, ranks)
        if model is None or data is None:
            raise ConfigError("train needs a model and data, or a run to resume.")
        return _begun(model, data, config or TrainConfig(), method or LoRA(), tokenizer, hear, ranks)


def _begun(
    model: Model, data: Source, config: TrainConfig, method: Method, tokenizer: Tokenizer | None,
    on_event: Callable[[Event], None], ranks: Ranks,
) -> RunResult:  # fmt: skip
    """Train a new run."""
    is_latest, config = config.out == LATEST, replace(config, out=ranks.by_first(lambda: dated(config.out)))
    if (
        config.shard == "full" and config.share == "auto"
    ):  # processes whose passes differ in number would wait for one another
        config = replace(config, share="off")
    home = RunFolder(Path(config.out))
    ranks.together(lambda: _check_dealt(config, ranks))
    ranks.together(lambda: trackers_of(config.track))
    inputs = {"the base": model, "the data": data, "the held-out records": config.valid, "the start": config.start}
    ranks.together(lambda: check_apart(home.path, inputs))
    with _at_work(home, ranks) as notes:
        ranks.by_first(lambda: check_free(home, overwrite=config.overwrite))
        prepared = ranks.together(lambda: prepare(model, data, config, method, tokenizer=tokenizer))
        folder = ranks.by_first(lambda: begin(home))
        job = _attached(prepared, folder, ranks)
        note = ranks.by_first(lambda: name_latest(home)) if is_latest else ""
        return _run(replace(job, notes=(*notes, *filter(None, [note]))), home, on_event)


@contextlib.contextmanager
def _at_work(folder: RunFolder, ranks: Ranks) -> Iterator[tuple[str, ...]]:
    """Be the one run that writes into a folder, while open: the first of its processes is (see `at_work`)."""
    with contextlib.ExitStack() as stack:
        yield ranks.by_first(lambda: stack.enter_context(at_work(folder)))


def _attached(prepared: Prepared, folder: RunFolder, ranks: Ranks) -> Job:
    """Attach the adapter in each process. Raises ConfigError where one has another base, or other settings or records."""
    job = ranks.together(lambda: attached(prepared, "default", folder, ranks=ranks))
    ranks.check_same({key: value for key, value in job.identity.items() if key != "environment"})
    if not job.is_dealt:
        return job
    deal_out(job)
    return replace(job, notes=(*job.notes, _DEALT))


_DEALT = "The base is dealt out over the processes, by blocks; what records begin with alike is computed for each (--share off)."


def _check_dealt(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ConfigError where a step has fewer records than there are processes."""
    if config.batch_tokens is None and config.batch < ranks.count:
        raise ConfigError(
            f"batch is {config.batch}, the records of a step, which {ranks.count} processes share: some would have none. Give "
            f"--batch {ranks.count} or more, or start fewer processes."
        )


def _resumed(asked: Asked, on_event: Callable[[Event], None], ranks: Ranks) -> RunResult:
    """Go on with a run from its last state, or from its beginning where it died before the first one."""
    home = RunFolder(asked.folder)
    with _at_work(home, ranks) as notes:
        ranks.by_first(lambda: finish_replacing(home))
        there = home.latest
        begun = ranks.together(lambda: asked.settled(there))
        ranks.together(lambda: _check_dealt(begun.config, ranks))
        states = ranks.together(lambda: read_states(there.path))
        if not states and there.is_whole:
            raise ConfigError(
                f"The run in {asked.folder} has come to its end, and its state is not there any more: it cannot be trained "
                f"further. A new run can begin with its adapter: --start {shlex.quote(str(there.adapter))}"
            )
        prepared = ranks.together(
            lambda: prepare(begun.model, begun.data, begun.config, begun.method, tokenizer=asked.tokenizer)
        )
        job = _attached(prepared, there, ranks)
        if states:
            job = _going_on(job, states[0], asked)
        else:
            job = replace(job, notes=("No state of the run had been saved: it begins anew.",))
        job = replace(job, notes=(*notes, *job.notes))
        new_home = RunFolder(Path(begun.config.out))
        if new_home.path.resolve() == home.path.resolve():
            return _run(job, home, on_event)
        inputs = {"the base": begun.model, "the data": begun.data, "the held-out records": begun.config.valid}
        ranks.together(lambda: check_apart(new_home.path, {**inputs, "the run to resume": home.path}))
        with _at_work(new_home, ranks):
            ranks.by_first(lambda: check_free(new_home, overwrite=begun.overwrite))
            moved = ranks.by_first(lambda: begin(new_home))
            ranks.by_first(lambda: copy_log(there, moved))
            return _run(replace(job, folder=moved), new_home, on_event)


def _going_on(job: Job, kept: Kept, asked: Asked) -> Job:
    """Return the job as it goes on from a state. Raises ConfigError where the state is of another run."""
    saved = kept.saved
    notes = check_same(kept.about, job.identity, asked.folder, may_change=asked.resume_with, finished=saved.has_ended)
    before, now = kept.about["settings"], job.identity["settings"]
    if saved.has_ended and any(before[key] != now[key] for key in LENGTHS):
        saved = saved.reopened()
    steps = _plan(job, lambda event: None, lambda: False).total_steps
    if saved.step > steps:
        raise ConfigError(
            f"The run in {asked.folder} has taken {saved.step} steps already: it cannot be resumed with a length of {steps}."
        )
    return replace(job, kept=replace(kept, saved=saved), notes=(*kept.notes, *notes))


def _run(job: Job, home: RunFolder, on_event: Callable[[Event], None]) -> RunResult:
    """Train what was prepared. The adapter stays attached as "default". home: where the run is in the end.

    The first process writes the run; the others take part in the steps, and where the base is dealt out in all that the model
    computes, and get its figures.
    """
    result = None
    if job.ranks.is_first:
        result = _written(job, home, on_event)
    else:
        _take_part(job)
    figures = None if result is None else {name: getattr(result, name) for name in _FIGURES}
    told = job.ranks.from_first(figures)
    return result or RunResult(**told, model=job.model, tokenizer=job.prepared.loaded.tokenizer)


_FIGURES = [field.name for field in fields(RunResult) if field.name not in ("model", "tokenizer")]


def _take_part(job: Job) -> None:
    """Compute this process's part of each step; where the base is dealt out, also of all else that the first one computes.

    Raises Interrupted where the run was asked to stop, and NotFinite as the first process does.
    """
    with asked_to_stop() as stopping:
        use(job.model, job.adapter)
        if job.kept is None:
            begin_with(job)
        steps = partial(_steps, job, stopping)
        if job.is_dealt:
            _worked(job, stopping, steps, lambda event: None)
            preview(job.model)
        else:
            steps(lambda event: None)


def _steps(job: Job, stopping: Stopping, hear: Callable[[Event], None]) -> LoopState:
    """Take this process's part in the loop, and write nothing."""
    plan = _plan(job, hear, stopping)
    try:
        with job.fellows.passing():
            state = run_loop(plan, start=job.kept.saved if job.kept else None)
    except NotFinite as error:
        if job.is_dealt:  # the first process looks for the last good values, with passes of the model
            raise with_what_was_good(job, plan, error) from error
        raise
    if state.stopped == "interrupted":
        raise Interrupted("Stopped.", exit_code=stopping.exit_code)
    return state


def _worked(
    job: Job, stopping: Stopping, train: Callable[[Callable[[Event], None]], LoopState], hear: Callable[[Event], None]
) -> tuple[LoopState, list[Sampled], HeldOutScores | None]:
    """Train, let the model answer samples before, during and after it, and score the held-out records.

    train: runs the loop, and tells what it is given of what happens in it.
    """
    chosen = records_to_answer(job)
    before = answers(job, chosen, None)
    state = train(answering(job, chosen, hear))
    if job.fellows.any(stopping()):
        chosen, before = [], []  # there is no time for samples
    samples = sampled(job, chosen, before, answers(job, chosen, job.adapter))
    return state, samples, None if job.fellows.any(stopping()) else scores(job)


def _written(job: Job, home: RunFolder, on_event: Callable[[Event], None]) -> RunResult:
    """Train what was prepared, and write the run."""
    names, where = trackers_of(job.prepared.config.track), job.folder.tracks
    with (
        asked_to_stop() as stopping,
        _recorded(job, on_event) as journal,
        tracked(names, home.path.name, where, job.settings, on_event) as trackers,
    ):
        train = partial(_train, job, journal, stopping)
        state, samples, held_out = _worked(job, stopping, train, both(journal.hear, trackers.hear))
        trackers.scores(held_out, state.step)
        return finished(job, journal, state, samples, home, held_out)


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
    begun = [attached(p, str(i), RunFolder(Path(p.config.out)), together) for i, p in enumerate(prepared)]
    jobs = _going_on_together(begun)
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(asked_to_stop())
        journals = [stack.enter_context(_recorded(job, partial(on_event, i))) for i, job in enumerate(jobs)]
        plans = [_plan(job, journal.hear, stopping) for job, journal in zip(jobs, journals, strict=True)]
        starts = [job.kept.saved for job in jobs if job.kept is not None]
        keep = stack.enter_context(_keeper(jobs, journals))
        ended = run_loops(plans, width, rungs, starts=starts, keep=keep)
        if any(state.stopped == "interrupted" for state in ended.states):
            raise Interrupted("Stopped. The same command goes on from here.", exit_code=stopping.exit_code)
        return [
            ended.failed.get(job.adapter) or _saved_and_finished(job, journal, state)
            for job, journal, state in zip(jobs, journals, ended.states, strict=True)
        ]


def _going_on_together(jobs: Sequence[Job]) -> Sequence[Job]:
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


def _goes_on(kept: Kept | None, job: Job) -> bool:
    """Return whether a job can go on from a state: one of the same runs together, or one that had come to its end."""
    return kept is not None and (kept.saved.has_ended or kept.about["together"] == list(job.together))


def _continued(job: Job, kept: Kept) -> Job:
    """Return one of several jobs as it goes on from a state. Raises ConfigError where the state is of another run."""
    notes = check_same(kept.about, job.identity, job.folder.path, may_change=(), finished=False)
    return replace(job, kept=kept, notes=tuple(notes))


def _is_at(saved: Saved, step: int) -> bool:
    """Return whether a loop was at this step, or had ended before it."""
    return saved.step == step or (saved.has_ended and saved.step < step)


@contextlib.contextmanager
def _recorded(job: Job, on_event: Callable[[Event], None]) -> Iterator[Journal]:
    """Keep the run's log, while open. It begins with what will be trained; a resumed run's goes on."""
    use(job.model, job.adapter)
    folder, kept = job.folder, job.kept
    if kept is None:
        begin_with(job)
        clear(folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    if kept is not None:
        go_on_from(kept, folder.path, {**kept.about, "settings": job.identity["settings"]})
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


def _opening_events(job: Job) -> Iterator[Event]:
    """Yield what will be trained, and what is worth a warning beforehand."""
    prepared, task = job.prepared, task_of(job.prepared.config.data)
    summary = sizes.summary(job.model)
    say("measuring memory")
    adapter, memory = summary.adapters[job.adapter], expected(prepared, job.ranks)
    yield Started(
        0, layers=adapter.layers, parameters=adapter.parameters, share=adapter.share, left_out=adapter.left_out,
        coverage=adapter.coverage.lines(), task=task.name, counted=task.counted, labels=prepared.config.data.labels,
        data=prepared.encoded.counts, base_bytes=summary.base_bytes, sets=prepared.sets,
        expected_memory=None if memory is None else memory.figures(), alike=alike(_plan(job)),
    )  # fmt: skip
    if prepared.sets.overlap is not None:
        yield Warned(0, prepared.sets.overlap)
    if memory is not None and memory.missing:
        yield Warned(0, memory.warning())
    if prepared.encoded.note:
        yield Warned(0, prepared.encoded.note)


def _plan(
    job: Job, on_event: Callable[[Event], None] = lambda event: None, stopping: Callable[[], bool] = lambda: False
) -> LoopPlan:
    """Return the plan of the run's loop. stopping: says whether it was asked to stop."""
    prepared = job.prepared
    return LoopPlan(
        task_of(prepared.config.data).loss(prepared.loaded),
        prepared.encoded.examples,
        prepared.valid.examples if prepared.valid else (),
        prepared.config,
        on_event=on_event,
        should_stop=stopping,
        adapter=job.adapter,
        ranks=job.ranks,
    )


def _keeper(jobs: Sequence[Job], journals: Sequence[Journal]) -> Keeper:
    """Return what writes the states of the runs. A state that cannot be written is a warning in each log."""

    def tell(text: str) -> None:
        for journal in journals:
            journal.hear(Warned(journal.events[-1].step, text))

    both = zip(jobs, journals, strict=True)
    places = {job.adapter: Place(job.folder.path, partial(_about, job, journal)) for job, journal in both}
    return Keeper(places, every=jobs[0].prepared.config.save_every, on_error=tell)


def _about(job: Job, journal: Journal) -> dict[str, Any]:
    """Return what stands in a state about its run."""
    of_log = {"log_bytes": journal.position(), "peak_memory": peak(job), "resumed": resumed_at(job)}
    return {**job.identity, "together": list(job.together), **of_log}


def _train(job: Job, journal: Journal, stopping: Stopping, hear: Callable[[Event], None]) -> LoopState:
    """Run the loop and save the adapter, however the loop ends. Raises Interrupted where it was asked to stop, and TrainError.

    hear: told of what happens in the loop.
    """
    adapter = job.folder.adapter
    plan, state = _plan(job, hear, stopping), LoopState()
    start = job.kept.saved if job.kept else None
    try:
        with _keeper([job], [journal]) as keep, job.fellows.passing():
            run_loop(plan, state, start=start, keep=keep)
    except NotFinite as error:
        raise with_what_was_good(job, plan, error) from error
    except BaseException as error:
        # Of a disk that is full the first error tells
        with contextlib.suppress(*([FileError] if isinstance(error, FileError) else [])):
            if values_are_finite(job):
                save(job, state.step)
        if isinstance(error, Lost):
            raise Lost(f"{error}\n{_resume_command(job)}") from error
        if _out_of_memory(error):
            raise TrainError(
                f"Out of memory after {state.step} steps. The adapter so far is in {adapter}.\n"
                "Try --micro-batch 1 (or another part of --batch), --gradient-checkpointing, a smaller --max-length, "
                "or --dtype bfloat16."
            ) from error
        raise
    save(job, state.step)
    if state.stopped == "interrupted":
        raise Interrupted(
            f"Stopped after step {state.step} of {plan.total_steps}. Its state is saved. {_resume_command(job)}\n"
            f"The adapter so far is in {adapter}.",
            exit_code=stopping.exit_code,
        )
    return state


def _resume_command(job: Job) -> str:
    return f"Go on from its last state with\n  deltaw train --resume {shlex.quote(str(job.settings['out']))}"


def _out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: a CPU's allocator raises a plain RuntimeError."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _saved_and_finished(job: Job, journal: Journal, state: LoopState) -> RunResult:
    """Save one of several runs over a model, and write what it came to."""
    use(job.model, job.adapter)
    save(job, state.step)
    return finished(job, journal, state, [])
