"""Which rank is enough, with evidence: losses of the same held-out items under several ranks, compared in pairs. Knows numbers
alone.

The smallest rank is chosen whose loss is not worse than the largest one's by more than a margin, with 95% confidence. The tests
go down from the largest rank and end at the first that fails. Such a fixed sequence of tests errs as a whole no more often than
one test does, whatever the number of ranks (Maurer et al. 1995), so nothing is taken off for their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from deltaw.study.resampling import Measured, Score


@dataclass(frozen=True)
class Tested:
    """One rank against the largest."""

    rank: int
    loss: Score
    difference: Score
    """Its loss less the largest rank's, item by item and seed by seed."""
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


def chosen(losses: Mapping[int, Measured], margin: float) -> Choice:
    """By the losses of each rank on the same items. `margin` is a share of the largest rank's loss, for example 0.01."""
    ranks = sorted(losses)
    largest = losses[max(ranks)]
    most = margin * largest.value
    tested = []
    for rank in ranks:
        difference = losses[rank].less(largest).interval()
        tested.append(Tested(rank, losses[rank].interval(), difference, difference.high <= most))
    enough = [each.rank for each in itertools.takewhile(lambda each: each.enough, reversed(tested))]
    return Choice(min(enough, default=max(ranks)), most, tested)
