"""Events of a training run, one class a kind: what the loop tells whoever logs or shows it. Knows no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deltaw.errors import shown

if TYPE_CHECKING:
    from deltaw.data import Counts
    from deltaw.data.groups import Alike
    from deltaw.training.prepare import Sets


@dataclass(frozen=True)
class Happened:
    """Base of the events: its kind and the step that it came after."""

    kind: ClassVar[str]
    """The word that log.jsonl has for such an event."""

    step: int
    """Optimizer steps taken so far."""

    def to_json(self) -> dict[str, object]:
        """Return the event's line of log.jsonl: its kind, then its fields by name."""
        return {"event": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Started(Happened):
    """The adapter is attached and the records are encoded; no step was taken yet."""

    kind: ClassVar[str] = "start"

    layers: int
    """Layers that take an update."""
    parameters: int
    """Trained values."""
    share: float
    """Their share of the base's parameters."""
    left_out: Mapping[str, str]
    """Dotted name of a module without an update → why."""
    coverage: Sequence[str]
    """Sentences on the layers that take an update and on those that do not."""
    task: str
    counted: str
    """The unit of the speed: tokens or images."""
    labels: Sequence[str] | None
    """Names of the classes; None for tasks without classes."""
    data: Counts
    base_bytes: int
    sets: Sets
    expected_memory: Mapping[str, int] | None
    """Bytes at the peak by part, with their total; None where shapes cannot tell it."""
    alike: Alike | None = None
    """Figures of records that begin alike; None of tasks and settings that share nothing."""


@dataclass(frozen=True)
class Stepped(Happened):
    """One logged optimizer step. Loss and speed are of the steps since the last logged one."""

    kind: ClassVar[str] = "step"

    loss: float
    """Mean over the predictions."""
    lr: float
    grad_norm: float | None
    """Before clipping; None where float16 overflowed and the step was skipped."""
    seconds: float
    """Since the start, evaluations included."""
    tokens: int
    """In all steps so far, without padding."""
    supervised: int
    """Predictions in all steps so far."""
    tokens_per_second: float
    memory: int
    """Bytes: the most that the process has held so far."""
    seconds_left: float
    total_steps: int


@dataclass(frozen=True)
class Evaluated(Happened):
    """The held-out records were scored."""

    kind: ClassVar[str] = "eval"

    valid_loss: float
    """Mean over the predictions."""
    best_loss: float
    """The lowest so far."""
    accuracy: float | None = None
    """Share of the records whose class is right; None for tasks without classes."""


@dataclass(frozen=True)
class Answered(Happened):
    """Held-out prompts were answered by the adapter as it is at this step (`samples_during`)."""

    kind: ClassVar[str] = "answers"

    answers: Sequence[str]
    """One for each of the first samples, in their order."""


@dataclass(frozen=True)
class Spiked(Happened):
    """A step's loss was far above those of the steps before. `step` is that step."""

    kind: ClassVar[str] = "spike"

    loss: float
    """Mean over the step's predictions."""
    usual: float
    """The average of the last steps."""
    grad_norm: float | None
    """Before clipping; None where float16 overflowed."""
    records: Sequence[str]
    """The step's records, by file and line."""

    @property
    def text(self) -> str:
        """Sentences for people."""
        of_records = f" Records: {shown(self.records, 3)}." if self.records else ""
        return f"The loss jumped to {self.loss:.4g} at step {self.step}, from about {self.usual:.4g}.{of_records}"


@dataclass(frozen=True)
class Warned(Happened):
    """A warning for people to read."""

    kind: ClassVar[str] = "warning"

    text: str


@dataclass(frozen=True)
class Resumed(Happened):
    """A run goes on from a state. Not in the log, which is as if there had been no break."""

    kind: ClassVar[str] = "resumed"

    notes: Sequence[str]
    """Sentences on what is worth knowing: a state that was damaged, a lock of a dead process, other versions."""


Event = Started | Stepped | Evaluated | Answered | Spiked | Warned | Resumed

_IN_LOG: dict[str, type[Event]] = {cls.kind: cls for cls in (Started, Stepped, Evaluated, Answered, Spiked, Warned)}


def event_from(values: Mapping[str, Any]) -> Event:
    """Return the event in a line of log.jsonl. Raises KeyError, TypeError or ValueError where it is none."""
    from deltaw.data import Counts
    from deltaw.data.groups import Alike
    from deltaw.training.prepare import Sets

    cls = _IN_LOG[values["event"]]
    fields = {name: value for name, value in values.items() if name != "event"}
    if cls is Started:
        fields |= {"data": Counts(**fields["data"]), "sets": Sets(**fields["sets"])}
        fields["alike"] = Alike(**fields["alike"]) if fields.get("alike") else None
    return cls(**fields)
