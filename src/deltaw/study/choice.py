"""Which rank is enough, with evidence: losses of the same held-out records under several ranks, compared in pairs. Knows numbers
alone.

The smallest rank is chosen whose loss is not worse than the largest one's by more than a margin, with 95% confidence. The tests
go down from the largest rank and end at the first that fails. Such a fixed sequence of tests errs as a whole no more often than
one test does, whatever the number of ranks (Maurer et al. 1995), so nothing is taken off for their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deltaw.study.metrics import Score
from deltaw.study.resampling import Losses, draws, score_of


@dataclass(frozen=True)
class Tested:
    """One rank against the largest."""

    rank: int
    loss: Score
    difference: Score
    """Its loss less the largest rank's, over the same resampled records."""
    enough: bool
    """The interval ends below the margin."""


@dataclass(frozen=True)
class Choice:
    """The smallest rank that is enough, and what says so."""

    rank: int
    margin: float
    """The most that a loss may be worse, in the loss's own unit."""
    tested: list[Tested]
    """All ranks, rising."""


def chosen(losses: Mapping[int, Losses], margin: float, *, seed: int = 0) -> Choice:
    """By the losses of each rank on the same records. `margin` is a share of the largest rank's loss, 0.01 say.

    Intervals are 95%, by bootstrap: each resample draws records, and of the seeds as many as there are, with replacement. Both
    are the same ones for every rank: runs of one seed saw the same records in the same order. (A rank that lacks the run of a
    seed draws seeds of its own.)
    """
    ranks = sorted(losses)
    drawn = draws(losses, seed)
    most, largest = margin * losses[ranks[-1]].value, ranks[-1]
    tested = []
    for rank in ranks:
        difference = score_of(losses[rank].value - losses[largest].value, drawn[rank] - drawn[largest])
        tested.append(Tested(rank, score_of(losses[rank].value, drawn[rank]), difference, difference.high <= most))
    enough = largest
    for each in reversed(tested):
        if not each.enough:
            break
        enough = each.rank
    return Choice(enough, most, tested)
