"""What every update answers: one adapter's change of one layer. Knows one layer, never a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from deltaw.layers.ops.merging import Change

if TYPE_CHECKING:
    from deltaw.methods.updates.lowrank import LowRank


class Update(nn.Module, ABC):
    """What all of them can do."""

    stackable = False
    """Rows of a batch that have updates of one rank can be computed as one product with their stacked A's and B's."""
    unmergeable: ClassVar[str] = ""
    """Why no merge can take it."""

    @abstractmethod
    def branch(self, layer: Any, *inputs: Any, **named: Any) -> Any:
        """The layer's output with this update."""

    @abstractmethod
    def changes(self, layer: Any) -> dict[str, Change]:
        """The layer's own name of a parameter → what a merge makes of it, as the matrix that `as_matrix` reads it as."""

    def parameter(self, layer: Any, own_name: str) -> Tensor | None:
        """The layer's parameter with this update, for modules that read it without calling the layer."""
        own: Tensor | None = layer._parameters[own_name]
        return own

    def low_rank(self) -> dict[str, LowRank]:
        """The low-rank updates that it is made of, by the layer's own names of the parameters that they are of."""
        return {}

    def values(self) -> dict[str, nn.Parameter]:
        """The values that it has in place of the layer's own, by the layer's own names of these parameters."""
        return {}

    @abstractmethod
    def misfit(self, layer: Any) -> str | None:
        """Why this update cannot go on this layer."""

    @abstractmethod
    def moved(self, layer: Any) -> tuple[float, float]:
        """‖ΔW‖² and ‖W0‖² over the parameters that it changes; of a low-rank update by A and B alone."""


def square(value: Tensor) -> float:
    """‖value‖², in fp32."""
    return float(value.detach().float().square().sum())
