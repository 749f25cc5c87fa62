"""One training run from end to end: model, records, loop, samples, run folder. Prints nothing; it emits events.

A run folder holds adapter/ (PEFT format), config.yaml (reproduces the run), log.jsonl, result.json and report.html.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltaw.config import GenerateConfig, TrainConfig, to_mapping, to_yaml
from deltaw.data import Record, as_said
from deltaw.errors import ConfigError, Interrupted, TrainError
from deltaw.files import store
from deltaw.files.formats.atomic import write_text
from deltaw.layers.ops.seeding import seeded
from deltaw.methods.lora import LoRA
from deltaw.methods.plan import Method
from deltaw.methods.registry import name_of
from deltaw.model import attach
from deltaw.model import summary as sizes
from deltaw.model.ends import teach
from deltaw.model.merging.merge import preview
from deltaw.model.merging.report import MergeReport
from deltaw.model.summary import Summary, parameters
from deltaw.model.switch import use, using
from deltaw.runs.folder import RunFolder, refuse_a_file
from deltaw.runs.memory.expected import expected
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.reports.train import Sampled, run_report
from deltaw.runs.results import JsonObject
from deltaw.runs.results.train import RunFigures
from deltaw.training.abreast import run_loops
from deltaw.training.events import Event, Started, Warned
from deltaw.training.loop import LoopPlan, LoopState, peak_memory, run_loop
from deltaw.training.optim import ADAM_STATE
from deltaw.training.prepare import Prepared, prepare
from deltaw.training.tasks import task_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

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
    ['adapter', 'config.yaml', 'log.jsonl', 'report.html', 'result.json']
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
    model: str | Path | nn.Module,
    data: str | Path | Sequence[Mapping[str, object]] | Dataset,
    config: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
    *,
    method: Method = LoRA(),  # noqa: B008  (frozen)
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> RunResult:
    """Train an update of a model and write the run folder `config.out`.

    Args:
        model: a hub id, a folder, a GGUF file, or a loaded model.
        data: a file, folder, hub data set or list of records to train on.
        config: the settings of training and of the records.
        method: what is trained: `LoRA`, `DoRA`, `IA3` …
        tokenizer: of a loaded model, which needs one.
        on_event: called with every logged step, evaluation and warning, as `deltaw.training.events` has them.

    Returns:
        The run's folder and figures, and the model with the trained adapter attached as "default".

    Raises:
        ConfigError: settings that do not fit each other, or a run folder that is not empty. Nothing is trained.
        FileError: a model that cannot be read. Nothing is trained.
        TargetError: targets that match no layer. Nothing is trained.
        DataError: records that cannot be used, all of them named. Nothing is trained.
        TrainError: a loss that is not finite. What was learned until then is in the run folder.
        Interrupted: Ctrl-C. What was learned until then is in the run folder.

    >>> import deltaw
    >>> config = deltaw.TrainConfig(out="run", steps=3, lr=1e-2, samples=0, overwrite=True)
    >>> result = deltaw.train("model", "train.jsonl", config, method=deltaw.LoRA(rank=4, targets="q,v"))
    >>> result.state.step, result.state.stopped, result.adapter.name
    (3, '', 'adapter')
    >>> deltaw.adapters(result.model).active
    'default'
    """
    _check_place(config)
    return run(prepare(model, data, config, method, tokenizer=tokenizer), on_event)


def run(prepared: Prepared, on_event: Callable[[Event], None] = lambda event: None) -> RunResult:
    """Train what was prepared, into its run folder, whose former content goes. The adapter stays attached as "default"."""
    job = _attached(prepared, "default")
    with _recorded(job, on_event) as journal:
        chosen = _records_to_answer(job)
        before = _answers(job, chosen, None)
        state = _train(job, journal)
    after = _answers(job, chosen, job.adapter)
    return _finished(job, journal, state, _samples(job, chosen, before, after))


def run_abreast(
    prepared: Sequence[Prepared],
    width: int,
    *,
    rungs: Sequence[float] = (),
    on_event: Callable[[int, Event], None] = lambda number, event: None,
) -> list[RunResult | TrainError]:
    """Train several runs that were prepared over one model.

    Args:
        prepared: the runs, each with a folder of its own. Their adapters stay attached, as "0", "1" …, the last one active.
        width: how many of them share a pass at most.
        rungs: where the worse half ends (see `run_loops`).
        on_event: called with the number of a run and its event.

    Returns:
        What each run came to. A loss that is not finite ends its own run alone.

    Raises:
        Interrupted: Ctrl-C.
    """
    jobs = [_attached(of_run, str(number)) for number, of_run in enumerate(prepared)]
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(_ctrl_c())
        journals = [stack.enter_context(_recorded(job, partial(on_event, i))) for i, job in enumerate(jobs)]
        plans = [_plan(job, journal, stopping) for job, journal in zip(jobs, journals, strict=True)]
        ended = run_loops(plans, width, rungs)
    if any(state.stopped == "interrupted" for state in ended.states):
        raise Interrupted("Stopped; what was finished is kept.")
    return [
        ended.failed.get(job.adapter) or _saved_and_finished(job, journal, state)
        for job, journal, state in zip(jobs, journals, ended.states, strict=True)
    ]


@dataclass(frozen=True)
class _Job:
    """A run whose adapter is attached."""

    prepared: Prepared
    folder: RunFolder
    adapter: str
    """The adapter's name on the model."""
    settings: dict[str, object]
    """The settings in config.yaml."""

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self.prepared.loaded.model
        return model


class _Journal:
    """The events of a run while it lasts: each is written to log.jsonl, kept, and passed on."""

    def __init__(self, path: Path, on_event: Callable[[Event], None]) -> None:
        self.events: list[Event] = []
        self._on_event = on_event
        self._file = path.open("w", encoding="utf-8")

    def hear(self, event: Event) -> None:
        self.events.append(event)
        self._file.write(json.dumps(event.to_json(), ensure_ascii=False) + "\n")
        self._file.flush()
        self._on_event(event)

    def close(self) -> None:
        self._file.close()


def _attached(prepared: Prepared, name: str) -> _Job:
    """Attach the adapter, drawn from the run's seed, and teach it the tokens that end its records."""
    model, config = prepared.loaded.model, prepared.config
    with seeded(config.seed):
        attach.attach(model, prepared.method, name=name)
    teach(model, name, prepared.encoded.ends)
    return _Job(prepared, RunFolder(Path(config.out)), name, _settings(prepared))


def _settings(prepared: Prepared) -> dict[str, object]:
    """Return what config.yaml holds: the command's own keys, so that `deltaw train --config` takes it as it is."""
    source, count = prepared.source, len(prepared.encoded.examples)
    data = source if isinstance(source, (str, Path)) else f"<{count} records in memory>"
    named = {"model": prepared.loaded.name, "data": str(data), "method": name_of(prepared.method)}
    return {**named, **to_mapping(prepared.method), **to_mapping(prepared.config)}


@contextlib.contextmanager
def _recorded(job: _Job, on_event: Callable[[Event], None]) -> Iterator[_Journal]:
    """Claim the run's folder, and while open keep its log, which begins with what will be trained."""
    use(job.model, job.adapter)
    _claim(job)
    with contextlib.closing(_Journal(job.folder.log, on_event)) as journal:
        for event in _opening_events(job):
            journal.hear(event)
        yield journal


def _claim(job: _Job) -> None:
    """Write config.yaml. The files of another run in the folder go, so that none of them is taken for this run's."""
    folder = job.folder
    folder.path.mkdir(parents=True, exist_ok=True)
    for stale in (folder.report, folder.result, folder.log):
        stale.unlink(missing_ok=True)
    shutil.rmtree(folder.adapter, ignore_errors=True)
    write_text(folder.config, to_yaml(job.settings))


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


def _plan(job: _Job, journal: _Journal, stopping: Callable[[], bool]) -> LoopPlan:
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


def _train(job: _Job, journal: _Journal) -> LoopState:
    """Run the loop and save the adapter, however the loop ends. Raises Interrupted after Ctrl-C, and TrainError."""
    adapter = job.folder.adapter
    with _ctrl_c() as stopping:
        plan, state = _plan(job, journal, stopping), LoopState()
        try:
            run_loop(plan, state)
        except BaseException as error:
            if all(bool(torch.isfinite(p).all()) for p in parameters(job.model, job.adapter)):
                _save(job)
            if _out_of_memory(error):
                raise TrainError(
                    f"Out of memory after {state.step} steps. The adapter so far is in {adapter}.\n"
                    "Try --micro-batch 1 (or another part of --batch), --gradient-checkpointing, a smaller --max-length, "
                    "or --dtype bfloat16."
                ) from error
            raise
        _save(job)
    if state.stopped == "interrupted":
        raise Interrupted(
            f"Stopped after step {state.step} of {plan.total_steps}; the adapter so far is in {adapter}.\n"
            f"Use it with --adapter {adapter}, or start again:\n"
            f"  deltaw train --config {job.folder.config} --overwrite"
        )
    return state


def _out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: a CPU's allocator raises a plain RuntimeError."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """While open, the first Ctrl-C asks the loop to stop after its step; a second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


# --- what is kept -------------------------------------------------------------------------------------------------


def _save(job: _Job) -> None:
    loaded = job.prepared.loaded
    tokenizer = loaded.tokenizer if loaded.handed_over else None
    store.save(job.model, job.folder.adapter, name=job.adapter, training=job.settings, tokenizer=tokenizer)


def _saved_and_finished(job: _Job, journal: _Journal, state: LoopState) -> RunResult:
    """Save one of several runs over a model, and write what it came to."""
    use(job.model, job.adapter)
    _save(job)
    return _finished(job, journal, state, [])


def _finished(job: _Job, journal: _Journal, state: LoopState, samples: list[Sampled]) -> RunResult:
    """Write result.json and the report of a run whose adapter is saved and active."""
    summary, merge = sizes.summary(job.model), preview(job.model)
    outcome = _figures(job, journal.events, state, summary, merge)
    write_text(job.folder.result, json.dumps(outcome.to_json(), indent=2, ensure_ascii=False) + "\n")
    write_report(run_report(job.settings, outcome, journal.events, samples), job.folder.report)
    return RunResult(
        folder=job.folder.path,
        adapter=job.folder.adapter,
        report=job.folder.report,
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
        peak_memory=peak_memory(),
        data=dataclasses.asdict(job.prepared.encoded.counts),
        sets=dataclasses.asdict(job.prepared.sets),
        warnings=[event.text for event in events if isinstance(event, Warned)],
    )


def _check_place(config: TrainConfig) -> None:
    """Raise ConfigError for a run folder that cannot be written, or holds something."""
    folder = Path(config.out)
    refuse_a_file(folder)
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        raise ConfigError(
            f"The run folder {folder} is not empty. Choose another --out, or pass --overwrite to replace it."
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
