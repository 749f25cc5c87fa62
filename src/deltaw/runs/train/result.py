"""Results of a training run: its figures, its report, and the value that `train` returns."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from deltaw.files import units
from deltaw.files.formats.atomic import write_text
from deltaw.files.formats.peft import card
from deltaw.model import summary as sizes
from deltaw.model.merging.merge import preview
from deltaw.model.merging.report import MergeReport
from deltaw.model.summary import Summary
from deltaw.progress import say
from deltaw.runs.evaluation.bootstrap import Score
from deltaw.runs.evaluation.card import Card
from deltaw.runs.memory import machine
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.reports.train import Sampled, run_report
from deltaw.runs.results import JsonObject
from deltaw.runs.results.train import HeldOutScores, RunFigures
from deltaw.runs.resume.journal import Journal
from deltaw.runs.resume.place import (
    RunFolder,
    put_in_place,
)
from deltaw.runs.train.job import Job, peak, resumed_at
from deltaw.runs.train.verdict import verdict
from deltaw.training.events import Evaluated, Event, Warned
from deltaw.training.loop import LoopState
from deltaw.training.optim import ADAM_STATE
from deltaw.training.tasks import task_of

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class RunResult(Card):
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

    def card(self) -> tuple[str, dict[str, str]]:
        """Return what was trained on what, its scores, its time and its place, in a few lines."""
        settings, state, outcome = self.settings, self.state, self.outcome
        rows = {
            "trained": f"{outcome.trainable_parameters:,} parameters, {outcome.trainable_share:.2%} of the base's",
            "time": f"{state.step} step{'s' * (state.step != 1)} in {units.duration(state.seconds)}"
            + (", stopped early" if state.stopped else ""),
        }
        if state.first_loss is not None and state.last_loss is not None:
            rows["training loss"] = f"{state.first_loss:.4f} → {state.last_loss:.4f}"
        held_out = [event.valid_loss for event in self.events if isinstance(event, Evaluated)]
        if held_out:
            best = f"best {state.best_loss:.4f} at step {state.best_step}"
            rows["held-out loss"] = f"{held_out[0]:.4f} → {held_out[-1]:.4f} ({best}, {self.sets['valid']})"
        rows |= {"adapter": f"{self.adapter}  {units.size(outcome.adapter_bytes)}", "report": str(self.report)}
        rows |= {"warnings": str(len(self.warnings))} if self.warnings else {}
        return f"{settings['method']} on {settings['model']}, trained on {settings['data']}", rows

    def figures(self) -> JsonObject:
        """Return the plain values of result.json."""
        return self.outcome.to_json()


def finished(
    job: Job, journal: Journal, state: LoopState, samples: list[Sampled], home: RunFolder | None = None,
    held_out: HeldOutScores | None = None,
) -> RunResult:  # fmt: skip
    """Write result.json and the report of a run whose adapter is saved and active, and put it in its place.

    home: where the run is in the end; where it was trained, if there is none. held_out: its scores, where they were taken.
    """
    for text in verdict(job, journal.events, state):
        journal.hear(Warned(state.step, text))
    say("writing the report")
    _say_scores(job, state, held_out)
    summary, merge = sizes.summary(job.model), preview(job.model)
    outcome = replace(_figures(job, journal.events, state, summary, merge), held_out=held_out)
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


def _say_scores(job: Job, state: LoopState, held_out: HeldOutScores | None) -> None:
    """Write the held-out scores with their intervals into the adapter's card, or the loss where the run has that alone."""
    unit = task_of(job.prepared.config.data).unit
    if held_out is not None:
        scores = {
            f"held-out {name}": _in_words(score, unit * (name == "loss")) for name, score in held_out.scores.items()
        }
        card.add_scores(job.folder.adapter, scores | {"held-out records": f"{held_out.records:,}; intervals are 95%"})
    elif state.valid_loss is not None:
        loss = min(state.best_loss, state.valid_loss)
        card.add_scores(job.folder.adapter, {"held-out loss": f"{loss:.4g} {unit}"})


def _in_words(score: Score, unit: str) -> str:
    """Return a score with its interval, where there is one, and its unit."""
    interval = f" [{score.low:.4g}, {score.high:.4g}]" if math.isfinite(score.low) else ""
    return f"{score.value:.4g}{interval} {unit}".strip()


def _figures(job: Job, events: Sequence[Event], state: LoopState, summary: Summary, merge: MergeReport) -> RunFigures:
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
        peak_memory=peak(job),
        resumed=resumed_at(job),
        data=dataclasses.asdict(job.prepared.encoded.counts),
        sets={name: value for name, value in dataclasses.asdict(job.prepared.sets).items() if name != "notes"},
        warnings=[event.text for event in events if isinstance(event, Warned)],
        environment=machine.describe(),
        processes=job.ranks.count,
    )
