"""One training run from end to end: model, records, loop, samples, run folder. Prints nothing: it reports events.

A run folder holds adapter/ (PEFT format), config.yaml (reproduces the run), log.jsonl, result.json and report.html.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.config import GenerateConfig, TrainConfig, to_mapping, to_yaml
from deltaw.data import Record, as_said
from deltaw.errors import ConfigError, Interrupted, TrainError
from deltaw.files import store
from deltaw.files.formats.atomic import write_text
from deltaw.layers.ops.seeding import seeded
from deltaw.methods.lora import LoRA
from deltaw.methods.registry import name_of
from deltaw.model import attach
from deltaw.model import summary as sizes
from deltaw.model.ends import teach
from deltaw.model.merge import MergeReport, preview
from deltaw.model.summary import Summary, parameters
from deltaw.model.switch import use, using
from deltaw.runs.memory.expected import expected
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.reports.train import Sampled, run_report
from deltaw.training.abreast import Abreast
from deltaw.training.events import Event, Started, Warned
from deltaw.training.loop import Loop, LoopState, peak_memory
from deltaw.training.optim import ADAM_STATE
from deltaw.training.prepare import Prepared, prepare
from deltaw.training.tasks import TASKS, task_of

ADAPTER, CONFIG, LOG, RESULT, REPORT = "adapter", "config.yaml", "log.jsonl", "result.json", "report.html"
_SAMPLE = GenerateConfig(max_new_tokens=96)


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `model` carries the trained adapter, active."""

    folder: Path
    adapter: Path
    report: Path
    model: Any
    tokenizer: Any
    settings: dict[str, Any]
    """Those of config.yaml."""
    state: LoopState
    summary: Summary
    merge: MergeReport
    """What merging the adapter into the base, in the dtype it was trained on, would do."""
    data: dict[str, Any]
    """Counts of the training records: kept, truncated, dropped, tokens …"""
    sets: dict[str, str | None]
    """What is in train and in valid, for example "300 records of 47 prompts", and their overlap in words."""
    samples: list[Sampled]
    log: list[dict[str, Any]]
    warnings: list[str]
    peak_memory: int

    def figures(self) -> dict[str, Any]:
        """The plain values of result.json."""
        adapter = self.summary.adapters[self.summary.active or "default"]
        size = sum(f.stat().st_size for f in self.adapter.iterdir())
        return {
            "loop": {
                name: None if value == math.inf else value for name, value in dataclasses.asdict(self.state).items()
            },
            "trainable_parameters": adapter.parameters,
            "trainable_share": adapter.share,
            "adapter_bytes": size,
            "bytes_with_optimizer": size + ADAM_STATE * adapter.parameters,
            "base_bytes": self.summary.base_bytes,
            "unit": TASKS[self.settings["task"]].unit,
            "counted": TASKS[self.settings["task"]].counted,
            "relative_norm": self.merge.relative,
            "merge": {
                "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
                "rows": self.merge.rows(),
            },
            "peak_memory": self.peak_memory,
            "data": self.data,
            "sets": self.sets,
            "warnings": self.warnings,
        }


def train(
    model: str | nn.Module,
    data: Any,
    config: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
    *,
    method: Any = LoRA(),  # noqa: B008  (frozen)
    tokenizer: Any = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> RunResult:
    """Train `method`'s update of `model` on `data` and write the run folder `config.out`.

    model: a hub id, a folder, a GGUF file, or a loaded model with its `tokenizer`. data: a file, folder, hub data set or a
    list of records. `on_event` hears of every logged step, evaluation and warning.

    Raises ConfigError, FileError, TargetError or DataError before any training; TrainError when the loss is not finite and
    Interrupted after Ctrl-C, both with what was learned so far saved in the run folder.
    """
    _check_place(config)
    return run(prepare(model, data, config, method, tokenizer=tokenizer), on_event)


def run(prepared: Prepared, on_event: Callable[[Event], None] = lambda event: None) -> RunResult:
    """Train what was prepared, into its run folder; what is there goes. The adapter stays attached as "default"."""
    _attach(prepared, "default")
    return _Run(Path(prepared.config.out), prepared, on_event).go()


def run_abreast(
    prepared: Sequence[Prepared],
    width: int,
    *,
    rungs: Sequence[float] = (),
    on_event: Callable[[int, Event], None] = lambda number, event: None,
) -> list[RunResult | TrainError]:
    """Train several that were prepared over one model, in one pass as many as `width`, each into its run folder; a loss that is
    not finite ends its own run alone. `rungs`: where the worse half ends (see `Abreast`); `on_event` hears which one an event
    is of. The adapters stay attached, as "0", "1" …, and the last one is active. Raises Interrupted after Ctrl-C."""
    runs = []
    for number, each in enumerate(prepared):
        _attach(each, str(number))
        runs.append(_Run(Path(each.config.out), each, partial(on_event, number), str(number)))
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(_ctrl_c())
        for each_run in runs:
            stack.enter_context(each_run.begun())
        together = Abreast([each_run.loop(stopping) for each_run in runs], width, rungs)
        together.run()
    if any(loop.state.stopped == "interrupted" for loop in together.loops):
        raise Interrupted("Stopped; what was finished is kept.")
    return [
        together.failed.get(each_run.name) or each_run.ended(loop.state)
        for each_run, loop in zip(runs, together.loops, strict=True)
    ]


def _attach(prepared: Prepared, name: str) -> None:
    """The adapter on its model, drawn from the run's seed, with the end tokens of what it will be taught."""
    model = prepared.loaded.model
    with seeded(prepared.config.seed):
        attach.attach(model, prepared.method, name=name)
    teach(model, name, prepared.encoded.ends)


@dataclass
class _Run:
    """What the steps of one run share."""

    folder: Path
    prepared: Prepared
    on_event: Callable[[Event], None]
    name: str = "default"
    """Of the adapter."""

    def __post_init__(self) -> None:
        self.loaded, self.config = self.prepared.loaded, self.prepared.config
        self.task = task_of(self.config.data)

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """While open, the run's folder is its own and its log is written."""
        use(self.loaded.model, self.name)
        self._claim_folder()
        with (self.folder / LOG).open("w", encoding="utf-8") as self.log_file:
            self._report_coverage()
            yield

    def ended(self, state: LoopState) -> RunResult:
        """What was trained, saved."""
        use(self.loaded.model, self.name)
        self._save()
        return self._finish(state, [])

    def go(self) -> RunResult:
        with self.begun():
            chosen = self._chosen_samples()
            before = self._sample(chosen, None)
            state = self._train()
        after = self._sample(chosen, self.name)
        wanted = [self.task.wanted(r, self.config.data) for r in chosen]
        if self.task.answers == "text":
            wanted = as_said(wanted, self.loaded.tokenizer)
        together = zip(chosen, wanted, before, after, strict=True)
        return self._finish(state, [Sampled(r.question, w, b, a) for r, w, b, a in together])

    def _claim_folder(self) -> None:
        """Write this run's config.yaml; what another run left here goes, so that nothing of it is taken for this one's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (REPORT, RESULT, LOG):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / ADAPTER, ignore_errors=True)
        self.settings = self._settings()
        write_text(self.folder / CONFIG, to_yaml(self.settings))
        self.log: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def _train(self) -> LoopState:
        """The loop, and the adapter saved, however the loop ends. Raises Interrupted after Ctrl-C."""
        with _ctrl_c() as stopping:
            loop = self.loop(stopping)
            try:
                state = loop.run()
            except BaseException as error:
                self._save_if_sound()
                if _out_of_memory(error):
                    raise TrainError(
                        f"Out of memory after {loop.state.step} steps. The adapter so far is in {self.folder / ADAPTER}.\n"
                        "Try --micro-batch 1 (or another part of --batch), --gradient-checkpointing, a smaller --max-length, "
                        "or --dtype bfloat16."
                    ) from error
                raise
            self._save()
        if state.stopped == "interrupted":
            raise Interrupted(
                f"Stopped after step {state.step} of {loop.total_steps}; the adapter so far is in {self.folder / ADAPTER}.\n"
                f"Use it with --adapter {self.folder / ADAPTER}, or start again:\n"
                f"  deltaw train --config {self.folder / CONFIG} --overwrite"
            )
        return state

    def loop(self, stopping: Callable[[], bool]) -> Loop:
        """Of this run; `stopping` says whether it was asked to stop."""
        return Loop(
            self.task.loss(self.loaded),
            self.prepared.encoded.examples,
            self.prepared.valid.examples if self.prepared.valid else (),
            self.config,
            on_event=self._hear,
            should_stop=stopping,
            adapter=self.name,
        )

    def _settings(self) -> dict[str, Any]:
        """What config.yaml holds: the command's own keys, so that `deltaw train --config` takes it as it is."""
        source, count = self.prepared.source, len(self.prepared.encoded.examples)
        data = source if isinstance(source, (str, Path)) else f"<{count} records in memory>"
        named = {"model": self.loaded.name, "data": str(data), "method": name_of(self.prepared.method)}
        return {**named, **to_mapping(self.prepared.method), **to_mapping(self.config)}

    def _report_coverage(self) -> None:
        summary = sizes.summary(self.loaded.model)
        adapter = summary.adapters[self.name]
        self.expected = expected(self.prepared)
        self._hear(Started(
            0, layers=adapter.layers, parameters=adapter.parameters, share=adapter.share, left_out=adapter.left_out,
            coverage=adapter.coverage.lines(), task=self.task.name, counted=self.task.counted, labels=self.config.data.labels,
            data=self.prepared.encoded.counts, base_bytes=summary.base_bytes, sets=self.prepared.sets,
            expected_memory=None if self.expected is None else self.expected.figures(),
        ))  # fmt: skip
        if self.prepared.sets.overlap is not None:
            self._hear(Warned(0, self.prepared.sets.overlap))
        if self.expected is not None and self.expected.missing:
            self._hear(Warned(0, self.expected.warning()))
        if self.prepared.encoded.note:
            self._hear(Warned(0, self.prepared.encoded.note))

    def _hear(self, event: Event) -> None:
        line = event.to_json()
        self.log.append(line)
        self.log_file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.log_file.flush()
        if isinstance(event, Warned):
            self.warnings.append(event.text)
        self.on_event(event)

    def _chosen_samples(self) -> list[Record]:
        seen: dict[Any, Record] = {}
        for record in self.prepared.valid_records.items if self.prepared.valid_records is not None else ():
            known = self.task.wanted(record, self.config.data) is not None and record.form != "text"
            if known and len(seen) < self.config.samples and self._fits(record):
                seen.setdefault(record.context, record)
        return list(seen.values())

    def _fits(self, record: Record) -> bool:
        return self.task.fits(self.loaded, record, self.config.data, _SAMPLE)

    def _sample(self, records: list[Record], adapter: str | None) -> list[str | None]:
        """What is said to each record; a head that nothing has trained says nothing."""
        if not records or (adapter is None and self.loaded.untrained):
            return [None] * len(records)
        with using(self.loaded.model, adapter):
            said = self.task.answer(self.loaded, records, self.config.data, _SAMPLE, lambda done: None)
        return [self.task.said(answer, self.config.data) for answer in said]

    def _save(self) -> None:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer if self.loaded.given else None
        store.save(model, self.folder / ADAPTER, name=self.name, training=self.settings, tokenizer=tokenizer)

    def _save_if_sound(self) -> None:
        if all(bool(torch.isfinite(p).all()) for p in parameters(self.loaded.model, self.name)):
            self._save()

    def _finish(self, state: LoopState, samples: list[Sampled]) -> RunResult:
        result = RunResult(
            folder=self.folder,
            adapter=self.folder / ADAPTER,
            report=self.folder / REPORT,
            model=self.loaded.model,
            tokenizer=self.loaded.tokenizer,
            settings=self.settings,
            state=state,
            summary=sizes.summary(self.loaded.model),
            merge=preview(self.loaded.model),
            data=dataclasses.asdict(self.prepared.encoded.counts),
            sets=dataclasses.asdict(self.prepared.sets),
            samples=samples,
            log=self.log,
            warnings=self.warnings,
            peak_memory=peak_memory(),
        )
        figures = result.figures()
        write_text(self.folder / RESULT, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
        write_report(run_report(self.settings, figures, self.log, samples), self.folder / REPORT)
        return result


def _check_place(config: TrainConfig) -> None:
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out is {folder}, which is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        raise ConfigError(
            f"The run folder {folder} is not empty. Choose another --out, or pass --overwrite to replace it."
        )


def _out_of_memory(error: BaseException) -> bool:
    """The CPU's allocator raises a plain RuntimeError."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """While open, the first Ctrl-C asks the loop to stop after its step; a second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
