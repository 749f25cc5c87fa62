"""Marks of losses far above those of the steps before: records to look at, or a rate that is too high."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from deltaw.training.events import Spiked

if TYPE_CHECKING:
    from deltaw.training.loop.checks import Watched
    from deltaw.training.loop.state import Loop

# Steps before the first that can be one: what is usual is not known earlier
_FIRST = 10
# Steps that tell what is usual
_WINDOW = 32
# Spreads above the usual loss. A spread is the median of |loss − usual|, scaled to a normal distribution's standard deviation.
# Normally distributed losses never pass it; of exponentially distributed ones, such as those of single records, 4 in 10,000 do
_SPREADS = 10.0
_NORMAL = 1.4826
# Times the usual loss that it must be, too: losses that hardly vary make no spike of nothing
_TIMES = 1.5
# The least loss that can be one: below it are rounding errors and chance, of an adapter that knows its records by heart
_LEAST = 1e-4
_OF_FIRST = 0.01  # the same as a share of the run's first loss


@dataclass
class Usual:
    """The losses of the last steps. Their medians do not follow a spike."""

    losses: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The median."""
        return median(self.losses)

    def is_passed(self, loss: float, first: float | None = None) -> bool:
        """Return whether a loss is far above what is usual. first: the first loss of the run, where it is known."""
        if len(self.losses) < _FIRST:
            return False
        usual = self.loss
        if loss <= max(
            _TIMES * usual, _LEAST, _OF_FIRST * (first or 0.0)
        ):  # as nearly always: the spread need not be known
            return False
        return loss > usual + _SPREADS * _NORMAL * median(abs(one - usual) for one in self.losses)

    def add(self, loss: float) -> None:
        """Take up the loss of a step."""
        self.losses = [*self.losses[1 - _WINDOW :], loss]


def mark(loop: Loop, step: Watched) -> None:
    """Tell of a step whose loss is a spike. On a GPU its values must be there."""
    loss, norm = step.here.tolist()
    if not math.isfinite(loss):
        return
    if loop.usual.is_passed(loss, loop.state.first_loss):
        norm_or_none = norm if math.isfinite(norm) else None
        loop.plan.on_event(Spiked(step.step + 1, loss, loop.usual.loss, norm_or_none, list(step.places)))
    loop.usual.add(loss)
