"""State of a long call as a view shows it: its phase, its bar and its figures, from notices and events. Knows no terminal."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from deltaw.files import units
from deltaw.progress import HeldOut, Notice, Phase, Runs, Stopping, Tick
from deltaw.runs.events import CandidateFinished, CandidateStarted, Confirming, Scored, TimingStarted
from deltaw.training.events import Resumed, Started

# Weight of the steps before in the smoothed loss
_KEPT = 0.9
# Steps that the speed is measured over
_WINDOW = 20


class Bar(NamedTuple):
    """The part of something that is done."""

    part: float
    total: float
    text: str
    """The same for people to read, for example "12/40 steps"."""


class Smoothed:
    """The mean of a run's losses in which those of the last steps weigh most."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, loss: float) -> None:
        """Take up a step's loss."""
        self._sum = _KEPT * self._sum + (1 - _KEPT) * loss
        self._weight = _KEPT * self._weight + (1 - _KEPT)

    @property
    def value(self) -> float | None:
        """The mean; None before the first step."""
        return self._sum / self._weight if self._weight else None


class Now:
    """State of one call as a view shows it.

    Args:
        subject: the call in a word, for example "training".
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.phase: Phase | None = Phase("loading")
        self.stopping = ""
        self.ended = ""
        """The end of the call in a word, once it is over."""
        self.counted = "tokens"
        self.ticks: dict[str, Tick] = {}
        """The last step of each run that is being trained."""
        self.held_out: HeldOut | None = None
        self.finished = 0
        """Runs that have come to their end."""
        self.fresh = 0
        """The number of them that took time, as they were not done before."""
        self.runs: int | None = None
        """All runs; None where there is one alone."""
        self._losses: dict[str, Smoothed] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._began = time.monotonic()

    # --- what comes in

    def notice(self, notice: Notice) -> None:
        """Take up a notice."""
        if isinstance(notice, Tick):
            self._tick(notice)
        elif isinstance(notice, Phase):
            self.phase = notice
        elif isinstance(notice, HeldOut):
            self.held_out = notice
        elif isinstance(notice, Runs):
            self.runs = max(notice.count, self.runs or 0)
        else:
            assert isinstance(notice, Stopping)
            self.stopping = notice.text

    def _tick(self, tick: Tick) -> None:
        self.phase = None
        if tick.run not in self.ticks:
            self._recent.clear()
        self.ticks[tick.run] = tick
        self._recent.append((tick.tokens, tick.step_seconds))
        if tick.loss is not None:
            self._losses.setdefault(tick.run, Smoothed()).add(tick.loss)

    def hear(self, event: object) -> None:
        """Take up an event."""
        if isinstance(event, Confirming):
            self.hear(event.event)
        elif isinstance(event, Started):
            self.counted = event.counted
        elif isinstance(event, Resumed):
            self.phase = Phase(f"resumed after step {event.step}")
        elif isinstance(event, TimingStarted):
            self.phase = Phase("timing inference with each method")
        elif isinstance(event, CandidateStarted):
            self.phase = Phase("getting ready", run=f"{event.name}, lr {event.lr:g}, seed {event.seed}")
        elif isinstance(event, CandidateFinished | Scored):
            self.finished += 1
            self.fresh += not isinstance(event, CandidateFinished) or event.fresh
            self.phase = self.held_out = None
            self._forget(
                f"{event.name}, lr {event.lr:g}, seed {event.seed}" if isinstance(event, CandidateFinished) else ""
            )

    def _forget(self, run: str) -> None:
        self.ticks.pop(run, None)
        self._losses.pop(run, None)

    # --- what goes out

    @property
    def is_study(self) -> bool:
        """True for a call of several runs."""
        return self.runs is not None

    @property
    def head(self) -> str:
        """The present in a few words."""
        phase = self.phase
        if self.ended:
            return self.ended
        if self.stopping and (phase is None or not phase.text.startswith("saving")):
            return self.stopping
        return self.subject if phase is None or self.is_study else _words(phase)

    @property
    def bar(self) -> Bar | None:
        """The call's progress; None where that is not known."""
        if self.runs is not None:
            runs = max(self.runs, self.finished)
            return Bar(min(self.finished + self._partial(), runs), runs, f"{self.finished}/{runs}")
        if tick := self.tick:
            return Bar(tick.step, tick.total_steps, f"{tick.step}/{tick.total_steps}")
        if self.phase is not None and self.phase.total is not None and self.phase.count is not None:
            return Bar(self.phase.count, self.phase.total, f"{self.phase.count}/{self.phase.total}")
        return None

    @property
    def tick(self) -> Tick | None:
        """The last step; of several runs at once that of the one that is least far."""
        return min(tuple(self.ticks.values()), key=lambda tick: tick.step / tick.total_steps, default=None)

    def seconds_left(self) -> float | None:
        """Return the time to the end, None where it is not known."""
        if self.runs is None:
            return self.tick.seconds_left if self.tick else None
        partial = self._partial()
        taken, left = self.fresh + partial, self.runs - self.finished - partial
        return max(left, 0.0) * (time.monotonic() - self._began) / taken if taken > 0 else None

    def _partial(self) -> float:
        """Return how much is done of the runs that go on."""
        return sum(tick.step / tick.total_steps for tick in tuple(self.ticks.values()))

    def loss(self) -> float | None:
        """Return the smoothed loss, of several runs at once their mean."""
        values = [mean for smoothed in tuple(self._losses.values()) if (mean := smoothed.value) is not None]
        return sum(values) / len(values) if values else None

    def speed(self) -> float | None:
        """Return tokens a second over the last steps; None before the first, and for several runs at once."""
        if len(self.ticks) != 1 or not self._recent:
            return None
        (first, began), (last, ended) = self._recent[0], self._recent[-1]
        if len(self._recent) == 1:
            first, began = 0, 0.0
        return (last - first) / (ended - began) if ended > began else None

    def place(self) -> list[str]:
        """Return where the call is: what a line has beside its bar."""
        tick, bar, left = self.tick, self.bar, None if self.ended else self.seconds_left()
        texts = [bar.text] if bar and not self.head.endswith(bar.text) else []
        if tick is not None and not self.is_study:
            texts.append(f"epoch {tick.epoch:.2f}")
        if left is not None:
            texts.append(f"{units.duration(left)} left")
        return texts

    def run(self) -> list[str]:
        """Return which of several runs goes on, and what it is at."""
        if not self.is_study:
            return []
        tick = self.tick
        if tick is None:
            return [": ".join(filter(None, (self.phase.run, _words(self.phase))))] if self.phase else []
        more = f" and {len(self.ticks) - 1} more" if len(self.ticks) > 1 else ""
        texts = [f"{tick.run}{more}", f"step {tick.step}/{tick.total_steps}"]
        if self.phase is not None:
            texts.append(_words(self.phase))
        return texts

    def texts(self) -> list[str]:
        """Return the run and the figures as short texts."""
        figures = self.figures().items()
        return [
            *self.run(),
            *(f"{value} {label}" if label.endswith("/s") else f"{label} {value}" for label, value in figures),
        ]

    def figures(self) -> dict[str, str]:
        """Return label → value, the most telling first."""
        tick, figures = self.tick, dict[str, str]()
        if (loss := self.loss()) is not None:
            figures["mean loss" if len(self.ticks) > 1 else "loss"] = f"{loss:.4f}"
        if self.held_out is not None:
            figures["held out"] = f"{self.held_out.loss:.4f}"
            if self.held_out.accuracy is not None:
                figures["accuracy"] = f"{self.held_out.accuracy:.3f}"
        if tick is not None:
            figures["lr"] = f"{tick.lr:.1e}"
            if (speed := self.speed()) is not None:
                figures[f"{self.counted}/s"] = f"{speed:,.0f}"
            figures["GPU" if tick.on_gpu else "memory"] = units.size(tick.memory)
        return figures


def _words(phase: Phase) -> str:
    """Return what goes on, with how much of it is done where that is counted."""
    count = f" {phase.count}" if phase.count is not None else ""
    return phase.text + (f"{count}/{phase.total}" if count and phase.total is not None else count)
