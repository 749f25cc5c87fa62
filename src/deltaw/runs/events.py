"""Events of a sweep, a comparison and a search for a rank, one class a kind. Those of a training run: training/events.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

if TYPE_CHECKING:
    from deltaw.runs.results import compare, sweep
    from deltaw.training.events import Stepped


@dataclass(frozen=True)
class CandidateEvent:
    """The part that all events of one candidate's run share."""

    name: str
    """The candidate's."""
    lr: float
    seed: int


@dataclass(frozen=True)
class CandidateStarted(CandidateEvent):
    """The run is about to begin."""

    kind: ClassVar[str] = "started"


@dataclass(frozen=True)
class CandidateStepped(CandidateEvent):
    """The run logged an optimizer step."""

    kind: ClassVar[str] = "step"

    progress: Stepped


@dataclass(frozen=True)
class CandidateFinished(CandidateEvent):
    """The run came to its end, now or before."""

    kind: ClassVar[str] = "finished"

    outcome: sweep.Outcome | compare.Outcome
    fresh: bool
    """False where it was trained by an earlier command, and read from its folder."""


@dataclass(frozen=True)
class RecordsRead:
    """The records were read in a way that is worth a word, or have fields that are not used."""

    kind: ClassVar[str] = "records"

    notes: Sequence[str]
    """Sentences for people."""


@dataclass(frozen=True)
class LeftOut:
    """A choice of targets is not tried, as its layers cannot hold the budget."""

    kind: ClassVar[str] = "left out"

    targets: str
    why: str


@dataclass(frozen=True)
class WidthChosen:
    """It is known how many candidates share one pass over the base."""

    kind: ClassVar[str] = "width"

    width: int
    why: str


@dataclass(frozen=True)
class TimingStarted:
    """Inference is about to be timed with each method."""

    kind: ClassVar[str] = "timing"

    names: Sequence[str]
    """The methods."""


@dataclass(frozen=True)
class Scored:
    """The base, or the adapter cut to a rank, was scored."""

    kind: ClassVar[str] = "scored"

    name: str
    """"base", or for example "r = 4"."""
    loss: float
    """Mean over the predictions; of classes their error rate."""
    by: str = "loss"
    """The figure's name."""


@dataclass(frozen=True)
class Confirming:
    """An event of the sweep that trains the recommended rank again."""

    kind: ClassVar[str] = "confirming"

    event: SweepEvent


SweepEvent: TypeAlias = RecordsRead | LeftOut | WidthChosen | CandidateStarted | CandidateStepped | CandidateFinished
CompareEvent: TypeAlias = RecordsRead | CandidateStarted | CandidateFinished | TimingStarted
RankEvent: TypeAlias = Scored | Confirming
