"""The figures in a run's result.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaw.training.loop import LoopState


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

    def to_json(self) -> dict[str, object]:
        """Return the values of result.json; a loss that there is not (∞) is null."""
        values: dict[str, object] = {}
        for field in dataclasses.fields(self):
            if field.name == "merge_rows":
                values["merge"] = {"dtype": self.merge_dtype, "rows": self.merge_rows}
            elif field.name != "merge_dtype":
                values[field.name] = getattr(self, field.name)
        return values | {"loop": finite(dataclasses.asdict(self.loop))}


def finite(values: Mapping[str, object]) -> dict[str, object]:
    """Return the values with None for ∞, which JSON does not have."""
    return {name: None if value == math.inf else value for name, value in values.items()}
