"""The figures in a run's result.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaw.runs.evaluation.bootstrap import Score
from deltaw.runs.evaluation.classes import Confusion
from deltaw.runs.memory.machine import Environment
from deltaw.training.loop import LoopState


@dataclass(frozen=True)
class HeldOutScores:
    """The scores of the trained adapter on the held-out records."""

    records: int
    scores: dict[str, Score]
    """Metric → its value, with the 95% interval over items."""
    confusion: Confusion | None
    """The confusion matrix; None for tasks without classes."""

    def to_json(self) -> dict[str, object]:
        """Return the plain values; an end of an interval that a single item does not allow is null."""
        scores = {
            metric: {name: value if math.isfinite(value) else None for name, value in score.plain().items()}
            for metric, score in self.scores.items()
        }
        confusion = None if self.confusion is None else self.confusion.to_json()
        return {"records": self.records, "scores": scores, "confusion": confusion}


@dataclass(frozen=True)
class RunFigures:
    """The figures of a finished run. Sizes are in bytes."""

    loop: LoopState
    """The state in which the loop ended."""
    trainable_parameters: int
    trainable_share: float
    """The share of the base's parameters."""
    adapter_bytes: int
    """The size of the adapter's folder."""
    bytes_with_optimizer: int
    """The same with AdamW's state."""
    base_bytes: int
    unit: str
    """The unit of the loss."""
    counted: str
    """The thing that the speed counts: tokens or images."""
    relative_norm: float
    """‖ΔW‖ / ‖W0‖ over all adapted layers."""
    merge_dtype: str
    """The precision of the weights that `merge_rows` are told for."""
    merge_rows: Sequence[Mapping[str, object]]
    """Figures of a merge for each family of layers, and for all."""
    peak_memory: int
    """The most that the process has held, on the GPU where one is in use."""
    data: dict[str, int]
    """Counts of the training records."""
    sets: dict[str, str | None]
    """The content of train and of valid in words, and a warning where they overlap."""
    warnings: list[str]
    resumed: list[int] = dataclasses.field(default_factory=list)
    """The steps after which the run was resumed; none of a run without a break."""
    held_out: HeldOutScores | None = None
    """Scores of the adapter that was kept; None where nothing is held out, or there was no time."""
    environment: Environment | None = None
    """The machine and versions, as runs/memory/machine.py describes them."""
    processes: int = 1
    """Processes that shared each step."""

    def to_json(self) -> dict[str, object]:
        """Return the values of result.json; a loss that there is not (∞) is null."""
        values: dict[str, object] = {}
        for field in dataclasses.fields(self):
            if field.name == "merge_rows":
                values["merge"] = {"dtype": self.merge_dtype, "rows": self.merge_rows}
            elif field.name != "merge_dtype":
                values[field.name] = getattr(self, field.name)
        held_out = None if self.held_out is None else self.held_out.to_json()
        return values | {"loop": finite(dataclasses.asdict(self.loop)), "held_out": held_out}


def finite(values: Mapping[str, object]) -> dict[str, object]:
    """Return the values with None for ∞, which JSON does not have."""
    return {name: None if value == math.inf else value for name, value in values.items()}
