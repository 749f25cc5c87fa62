"""The questions that every update answers: one adapter's change of one layer. Knows one layer, never a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from deltaw.layers.ops.merging import Change, Product

if TYPE_CHECKING:
    from deltaw.methods.updates.lowrank import LowRank

Letter = Literal["A", "B"]
Sums = MutableMapping[tuple[tuple[int, float], ...], nn.Parameter]
"""(identity, weight) of each parameter that was summed → their sum. Layers that share a parameter share it in the sum too."""

UNALIKE = "some of the adapters train it whole, others by an update; merge(model, weights=…) can add them up"


class Update(nn.Module, ABC):
    """One adapter's change of one layer.

    Callers ask it the questions below and never for its class, so that a new form of update needs no edit of theirs.
    """

    unmergeable: ClassVar[str] = ""
    """Why no weight can hold it; empty where one can."""
    of_weights: ClassVar[bool] = False
    """It changes weights that are only parameters of their module. Else the module is the layer that it changes."""
    own_sum: ClassVar[bool] = False
    """`summed` adds up updates of this class. Else their sum is that of their `low_rank()` and of their `values()`."""
    done_to_layer: ClassVar[str] = "trained whole"
    """Words of messages for a layer that has such an update."""

    # --- computing ----------------------------------------------------------------------------------------------

    @abstractmethod
    def branch(self, layer: nn.Module, *inputs: Any, **named: Any) -> Any:
        """Compute the layer's output with this update, from the inputs that the layer's forward takes."""

    def parameter(self, layer: nn.Module, own_name: str) -> Tensor | None:
        """Return the layer's parameter with this update, in the layer's shape and dtype.

        For modules that read a layer's parameter without calling the layer.
        """
        return layer._parameters[own_name]

    @property
    def plain(self) -> LowRank | None:
        """The update itself if it is A, B and a scale on a layer that multiplies by a matrix, and nothing else.

        Only such updates can be computed together: of layers that read the same tensor, or of the rows of a batch.
        """
        return None

    @property
    def stackable(self) -> bool:
        """True if rows of a batch that have such updates of one rank are one product with their stacked A's and B's."""
        return self.plain is not None

    # --- what it trains -----------------------------------------------------------------------------------------

    def factors(self) -> Mapping[Letter, nn.Parameter]:
        """Return the trained parameters that A and B are, or are made of, by these letters; empty where it has none."""
        return {}

    def low_rank(self) -> Mapping[str, LowRank]:
        """Return the low-rank updates that it consists of, by the layer's names of the parameters that they change."""
        return {}

    def values(self) -> Mapping[str, nn.Parameter]:
        """Return the trained values of whole parameters, by the layer's names of these. The layer may lack one (a bias)."""
        return {}

    def replaced(self) -> Mapping[str, nn.Parameter]:
        """Return what stands in place of the base's values, whole or in some rows, by the layer's names of its parameters."""
        return {}

    def covers(self, layer: nn.Module) -> bool:
        """True if it has a value in place of each parameter of the layer, which has some."""
        parameters = {name for name, p in layer._parameters.items() if p is not None}
        return bool(parameters) and parameters == self.values().keys()

    # --- merging and adding up ----------------------------------------------------------------------------------

    @property
    def mergeable(self) -> bool:
        """True if a weight can hold it; `unmergeable` is the reason where none can."""
        return not self.unmergeable

    @property
    def exact_product(self) -> Product | None:
        """ΔW as scale·B·A with A [r, k] and B [d, r] ([E, r, k] and [E, d, r] of a stack), detached; None if it is no product."""
        return None

    @abstractmethod
    def changes(self, layer: nn.Module) -> dict[str, Change]:
        """Return what a merge makes of the layer's parameters, by their names, each as the matrix of `as_matrix`."""

    def why_no_sum(self, other: Update) -> str | None:
        """Return why no update of this layer is the sum of these two; None where one is."""
        return UNALIKE if (self.own_sum or other.own_sum) and type(self) is not type(other) else None

    def summed(self, layer: nn.Module, terms: Sequence[tuple[Update, float]], sums: Sums) -> Update:
        """Return the update that adds Σ weight·(what each term adds); `terms` are of this class, `sums` is filled.

        Raises NotImplementedError for a class without `own_sum`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sum of its own form")

    # --- fitting and measuring ----------------------------------------------------------------------------------

    @abstractmethod
    def misfit(self, layer: nn.Module) -> str | None:
        """Return why this update cannot go on this layer; None where it can."""

    def other_shape(self, layer: nn.Module) -> str | None:
        """Do as `misfit`, for a layer of which it is known that it takes updates of this class: its shapes remain."""
        return self.misfit(layer)

    @abstractmethod
    def moved(self, layer: nn.Module) -> tuple[float, float]:
        """Return ‖ΔW‖² and ‖W0‖² over the parameters that it changes; of a low-rank update without forming ΔW."""


def own_tensor(layer: nn.Module, own_name: str) -> Tensor:
    """Return a parameter that the layer is known to have, by the layer's name of it."""
    value = layer._parameters[own_name]
    assert value is not None
    return value


def square(value: Tensor) -> float:
    """Return ‖value‖², computed in fp32."""
    return float(value.detach().float().square().sum())
