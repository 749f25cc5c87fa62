"""One training run from end to end: model, records, loop, samples, run folder. Prints nothing: it reports events.

A run folder holds adapter/ (PEFT format), config.yaml (reproduces the run), log.jsonl, result.json and report.html.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw import attached, store, summaries
from deltaw.config import GenerateConfig, TrainConfig, to_mapping, to_yaml
from deltaw.data import Encoded, Record, held_out_split, read
from deltaw.data.sources import is_path
from deltaw.errors import AdapterError, ConfigError, DataError, Interrupted, TrainError
from deltaw.files.atomic import write_text
from deltaw.merge_report import MergeReport
from deltaw.merged import preview
from deltaw.methods.lora import LoRA
from deltaw.methods.registry import name_of
from deltaw.pretrained import HEADED, Pretrained, head_of, read_config
from deltaw.study.report import write as write_report
from deltaw.study.run_report import Sampled, run_report
from deltaw.summaries import Summary
from deltaw.switching import using
from deltaw.tasks import TASKS, opened, prepared, recognised, task_of
from deltaw.training.loop import Event, Loop, LoopState, peak_memory

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
    samples: list[Sampled]
    log: list[dict[str, Any]]
    warnings: list[str]
    peak_memory: int

    def figures(self) -> dict[str, Any]:
        """The plain values of result.json."""
        adapter = self.summary.adapters[self.summary.active or "default"]
        return {
            "loop": dataclasses.asdict(self.state),
            "trainable_parameters": adapter.parameters,
            "trainable_share": adapter.share,
            "adapter_bytes": sum(f.stat().st_size for f in self.adapter.iterdir()),
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
    folder = _claim(config)
    source = data
    records = read(data, config.data, split=config.data.split)
    valid_records = _held_out(source, records, config)
    config = replace(config, data=recognised(config.data, records, _config_of(model)))
    task = task_of(config.data)
    torch.manual_seed(config.seed)  # of a head that the checkpoint does not have
    loaded = _loaded(model, tokenizer, config)
    config = _resolved(config, records.form, loaded, getattr(method, "positions", 0))
    train_records, valid_records = _split(records, valid_records, config)
    encoded = task.encode(train_records, loaded, config.data)
    valid = task.encode(valid_records, loaded, config.data) if valid_records is not None else None
    method = _with_head(method, loaded.head)
    torch.manual_seed(config.seed)
    attached.attach(loaded.model, method)
    return _Run(folder, loaded, source, config, method, encoded, valid, valid_records, on_event).go()


@dataclass
class _Run:
    """What the steps of one run share."""

    folder: Path
    loaded: Pretrained
    source: Any
    config: TrainConfig
    method: Any
    encoded: Encoded
    valid: Encoded | None
    valid_records: Any
    on_event: Callable[[Event], None]

    def __post_init__(self) -> None:
        self.task = task_of(self.config.data)

    def go(self) -> RunResult:
        self._claim_folder()
        with (self.folder / LOG).open("w", encoding="utf-8") as self.log_file:
            self._report_coverage()
            chosen = self._chosen_samples()
            before = self._sample(chosen, None)
            state = self._train()
        after = self._sample(chosen, "default")
        wanted = [self.task.wanted(r, self.config.data) for r in chosen]
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
            loop = Loop(
                self.task.loss(self.loaded),
                self.encoded.examples,
                self.valid.examples if self.valid else (),
                self.config,
                on_event=self._hear,
                should_stop=stopping,
            )
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

    def _settings(self) -> dict[str, Any]:
        """What config.yaml holds: the command's own keys, so that `deltaw train --config` takes it as it is."""
        data = (
            self.source if isinstance(self.source, (str, Path)) else f"<{len(self.encoded.examples)} records in memory>"
        )
        named = {"model": self.loaded.name, "data": str(data), "method": name_of(self.method)}
        return {**named, **to_mapping(self.method), **to_mapping(self.config)}

    def _report_coverage(self) -> None:
        summary = summaries.summary(self.loaded.model)
        adapter = summary.adapters["default"]
        self._hear(Event("start", 0, {
            "layers": adapter.layers, "parameters": adapter.parameters, "share": adapter.share, "left_out": adapter.left_out,
            "task": self.task.name, "counted": self.task.counted, "labels": self.config.data.labels,
            "data": dataclasses.asdict(self.encoded.counts), "base_bytes": summary.base_bytes,
        }))  # fmt: skip

    def _hear(self, event: Event) -> None:
        line = {"event": event.kind, "step": event.step, **event.values}
        self.log.append(line)
        self.log_file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.log_file.flush()
        if event.kind == "warning":
            self.warnings.append(event.values["text"])
        self.on_event(event)

    def _chosen_samples(self) -> list[Record]:
        seen: dict[Any, Record] = {}
        for record in self.valid_records.items if self.valid_records is not None else ():
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
        store.save(self.loaded.model, self.folder / ADAPTER, training=self.settings)

    def _save_if_sound(self) -> None:
        if all(bool(torch.isfinite(p).all()) for p in attached.parameters(self.loaded.model, "default")):
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
            summary=summaries.summary(self.loaded.model),
            merge=preview(self.loaded.model),
            data=dataclasses.asdict(self.encoded.counts),
            samples=samples,
            log=self.log,
            warnings=self.warnings,
            peak_memory=peak_memory(),
        )
        figures = result.figures()
        write_text(self.folder / RESULT, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
        write_report(run_report(self.settings, figures, self.log, samples), self.folder / REPORT)
        return result


def _claim(config: TrainConfig) -> Path:
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out is {folder}, which is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        raise ConfigError(
            f"The run folder {folder} is not empty. Choose another --out, or pass --overwrite to replace it."
        )
    return folder


def _config_of(model: Any) -> Any:
    """transformers' config of a model by its name, or of an object (None where that has none)."""
    return read_config(str(model)) if isinstance(model, (str, Path)) else getattr(model, "config", None)


def _with_head(method: Any, head: Sequence[str]) -> Any:
    """The method with these modules trained whole beside it."""
    if not head or not hasattr(method, "whole"):
        return method
    given = [w.strip() for w in method.whole.split(",")] if isinstance(method.whole, str) else method.whole
    return replace(method, whole=",".join(dict.fromkeys([*filter(None, given), *head])))


def _loaded(model: Any, tokenizer: Any, config: TrainConfig) -> Pretrained:
    task, labels = config.data.task, config.data.labels
    if isinstance(model, (str, Path)):
        return opened(str(model), config.data, dtype=config.dtype, device=config.device, to_train=True)
    if tokenizer is None:
        raise ConfigError("A model object needs its tokenizer: train(model, data, config, tokenizer=…).")
    if "default" in attached.adapters(model):
        raise AdapterError("The model has an adapter 'default' already: detach it first.")
    outputs = getattr(model.config, "num_labels", None)
    if labels is not None and outputs != len(labels):
        few = ", ".join(labels[:5]) + (" …" if len(labels) > 5 else "")
        raise ConfigError(
            f"The records have {len(labels)} classes ({few}), and the model's head has {outputs} outputs: open it with "
            f"num_labels={len(labels)}."
        )
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return Pretrained(model, tokenizer, name, head_of(model) if task in HEADED else ())


def _resolved(config: TrainConfig, form: str, loaded: Pretrained, taken: int) -> TrainConfig:
    """The settings with what `auto` came to, so that config.yaml reproduces the run on another machine, and a prompt given
    to the adapter later is wrapped as the records were."""
    data = prepared(config.data, form, loaded, taken)
    dtype = str(loaded.model.dtype).removeprefix("torch.") if hasattr(loaded.model, "dtype") else config.dtype
    return replace(config, data=data, dtype=dtype)  # type: ignore[arg-type]


def _held_out(source: Any, records: Any, config: TrainConfig) -> Any:
    """The held-out records where there is a split or file for them, else None."""
    if config.valid is not None:
        if is_path(config.valid):
            return read(config.valid, config.data)
        return read(source, config.data, split=config.valid)
    split = held_out_split(source) if isinstance(source, (str, Path)) else None
    return read(source, config.data, split=split) if split else None


def _split(records: Any, valid: Any, config: TrainConfig) -> tuple[Any, Any]:
    """Seeded: a part held out where there was none, then at most max_records to train on and valid_most to evaluate on."""
    items = list(records.items)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(config.seed)).tolist()
    if valid is None and config.valid_share > 0 and len(items) >= 20:
        count = max(1, min(round(len(items) * config.valid_share), config.valid_most))
        order, held = order[count:], order[:count]
        valid = replace(records, items=[items[i] for i in held])
    elif valid is not None and len(valid.items) > config.valid_most:
        picks = torch.randperm(len(valid.items), generator=torch.Generator().manual_seed(config.seed)).tolist()
        valid = replace(valid, items=[valid.items[i] for i in picks[: config.valid_most]])
    if config.data.max_records is not None:
        order = order[: config.data.max_records]
    if not order:
        raise DataError("No training records are left after holding some out.")
    return replace(records, items=[items[i] for i in sorted(order)]), valid


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
