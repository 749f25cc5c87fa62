"""A call in plain lines: events in words, which stay. A terminal has them above its live view, a pipe by themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from deltaw.cli import show
from deltaw.cli.now import Now
from deltaw.files import units
from deltaw.progress import Notice, Stopping, watched
from deltaw.runs.events import CandidateEvent, CandidateFinished, Confirming, LeftOut, RecordsRead, Scored, WidthChosen
from deltaw.training.events import Evaluated, Resumed, Spiked, Started, Stepped, Warned

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from deltaw.runs.results import compare, sweep

TRAINING = "training"
"""The subject of a call that is one run: each of its logged steps is a line."""
# Seconds between two lines of another call
_LINE_EVERY = 10.0


@dataclass(frozen=True)
class Line:
    """A line for people."""

    text: str
    style: str | None = None
    warning: bool = False
    """True for one that goes to standard error in any case."""


def lines(event: object) -> Iterator[Line]:
    """Yield the lines that tell of an event; none for steps, which `step_line` has, and for what only moves the view."""
    if isinstance(event, Confirming):
        yield from lines(event.event)
    elif isinstance(event, Started):
        yield from _started(event)
    elif isinstance(event, Evaluated):
        accuracy = "" if event.accuracy is None else f"  accuracy {event.accuracy:.3f}"
        yield Line(f"step {event.step}  held-out loss {event.valid_loss:.4f}{accuracy}")
    elif isinstance(event, Resumed):
        yield Line(f"Resumed after step {event.step}.", "bold")
        yield from (Line(note, "yellow", warning=True) for note in event.notes)
    elif isinstance(event, Spiked | Warned):
        yield Line(f"warning: {event.text}", "yellow", warning=True)
    else:
        yield from _of_study(event)


def step_line(event: Stepped, counted: str) -> Line:
    """Return the line of a logged step."""
    return Line(
        f"step {event.step}/{event.total_steps}  loss {event.loss:.4f}  lr {event.lr:.2e}  "
        f"{event.tokens_per_second:.0f} {counted}/s  {units.size(event.memory)}  {units.duration(event.seconds_left)} left"
    )


def _started(event: Started) -> Iterator[Line]:
    """Yield what trains, what does not and why, and a summary of the data."""
    data = event.data
    yield Line(
        f"{event.layers} layers take an update: {event.parameters:,} parameters, {event.share:.2%} of the base's.",
        "bold",
    )
    yield from (Line(f"  {line}", "dim") for line in event.coverage)
    what = f"{data.tokens:,} tokens, {data.supervised:,} of them supervised"
    if event.task not in ("causal", "seq2seq"):
        what = "numbers to predict" if event.labels is None else f"{len(event.labels)} classes"
        what += "" if event.task == "image" else f", {data.tokens:,} tokens"
    yield Line(
        f"{data.kept:,} records, {what} (truncated {data.truncated}, dropped {data.dropped}, longest {data.longest})."
    )
    held = f"held out: {event.sets.valid}" if event.sets.valid else "nothing is held out"
    yield Line(f"Trained on {event.sets.train}; {held}.")
    yield from (Line(note, "dim", warning=True) for note in event.sets.notes)
    if event.alike is not None and event.alike.text:
        yield Line(event.alike.text)
    if event.expected_memory:
        yield Line(_memory(event.expected_memory))


def _memory(parts: Mapping[str, int]) -> str:
    """The expected peak and its parts; parts of 0 bytes, such as a GPU's process, are left out."""
    names = ("process", "weights", "adapter", "gradients", "optimizer", "activations", "working", "heap")
    listed = ", ".join(f"{name} {units.size(parts[name])}" for name in names if parts[name])
    return f"About {units.size(parts['total'])} of memory at the peak: {listed}."


def _of_study(event: object) -> Iterator[Line]:
    if isinstance(event, RecordsRead):
        yield from (Line(note, "dim", warning=True) for note in event.notes)
    elif isinstance(event, LeftOut):
        yield Line(f"{event.targets} is left out: {event.why}.", "yellow")
    elif isinstance(event, WidthChosen):
        how = "one after the other" if event.width == 1 else f"{event.width} in one pass over the base"
        yield Line(f"Candidates are trained {how}: {event.why}.", "dim")
    elif isinstance(event, CandidateFinished):
        yield Line(f"{named(event):<40} {_outcome(event.outcome)}{'' if event.fresh else '  (done before)'}")
    elif isinstance(event, Scored):
        yield Line(f"{event.name}: {event.by} {event.loss:.4f}")


def named(event: CandidateEvent) -> str:
    """Return a candidate's name with what is tried of it."""
    return f"{event.name}, lr {event.lr:g}, seed {event.seed}"


def _outcome(outcome: sweep.Outcome | compare.Outcome) -> str:
    """Return what a candidate came to."""
    from deltaw.runs.results.study import Failed
    from deltaw.runs.results.sweep import Behind, RunScore

    if isinstance(outcome, Failed):
        return f"failed: {outcome.error.splitlines()[0]}"
    if isinstance(outcome, Behind):
        return f"held-out loss {outcome.valid_loss:.4f} at step {outcome.step}, in the worse half: ended"
    if isinstance(outcome, RunScore):
        return f"held-out loss {outcome.valid_loss:.4f} in {units.duration(outcome.seconds)}"
    figures = outcome.figures
    loss = "" if figures.valid_loss is None else f"held-out loss {figures.valid_loss:.4f}  "
    return f"{loss}{figures.steps} steps in {units.duration(figures.seconds)}"


class Lines:
    """Shows a call in plain lines, without control codes. Open as a context; notices come in while it is open.

    Args:
        subject: the call in a word.
        console: what moves is shown there.
        out: lines that stay go there, warnings to standard error.
        quiet: show no lines of events.
    """

    def __init__(self, subject: str, *, console: Console, out: Console, quiet: bool = False) -> None:
        self.now = Now(subject)
        self.console, self.out, self.quiet = console, out, quiet
        self._watching: AbstractContextManager[None] = watched(self.notice)
        self._told = time.monotonic()
        self._asked_to_stop = False

    def __enter__(self) -> Lines:
        self._watching.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *rest: Any) -> None:
        self._watching.__exit__(kind, *rest)

    def hear(self, event: Any) -> None:
        """Show an event."""
        self.now.hear(event)
        if not self.quiet:
            if isinstance(event, Stepped):
                self.step(event)
            for line in lines(event):
                self.line(line)

    def notice(self, notice: Notice) -> None:
        """Take up a notice, and show it where it is time. For one of a signal's handler nothing is written."""
        self.now.notice(notice)
        if isinstance(notice, Stopping):
            self._asked_to_stop = True
        else:
            self.draw()

    def line(self, line: Line) -> None:
        """Print a line that stays."""
        show.prose(line.text, style=line.style, console=show.err if line.warning else self.out)

    def step(self, event: Stepped) -> None:
        """Show a logged step."""
        self.line(step_line(event, self.now.counted))

    def draw(self) -> None:
        """Print where the call is, if the last line was a while ago."""
        if self._asked_to_stop:
            self._asked_to_stop = False
            self.line(Line(self.now.stopping))
        if self.now.subject != TRAINING and time.monotonic() - self._told >= _LINE_EVERY:
            self._told = time.monotonic()
            show.prose("  ".join([self.now.head, *self.now.place(), *self.now.texts()]), console=self.console)
