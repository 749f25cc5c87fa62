"""Which rank is enough, with evidence: losses of the same held-out records under several ranks, compared in pairs. Knows numbers
alone.

The smallest rank is chosen whose loss is not worse than the largest one's by more than a margin, with 95% confidence. The tests
go down from the largest rank and end at the first that fails. Such a fixed sequence of tests errs as a whole no more often than
one test does, whatever the number of ranks (Maurer et al. 1995), so nothing is taken off for their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.study.metrics import Score

_RESAMPLES = 2000
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Losses:
    """Of n records under one rank, trained from one seed or several."""

    sums: Array
    """[seeds, n]: of each record the sum of its predictions' losses."""
    counts: Array
    """[n]: the number of its predictions."""

    @property
    def value(self) -> float:
        """Per prediction, over all seeds."""
        return float(self.sums.sum() / (self.counts.sum() * len(self.sums)))

    @property
    def seeds(self) -> list[float]:
        """Per prediction, of each seed."""
        return [float(v) for v in self.sums.sum(1) / self.counts.sum()]


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
    draws = _draws(losses, seed)
    most, largest = margin * losses[ranks[-1]].value, ranks[-1]
    tested = []
    for rank in ranks:
        difference = _score(losses[rank].value - losses[largest].value, draws[rank] - draws[largest])
        tested.append(Tested(rank, _score(losses[rank].value, draws[rank]), difference, difference.high <= most))
    enough = largest
    for each in reversed(tested):
        if not each.enough:
            break
        enough = each.rank
    return Choice(enough, most, tested)


def _draws(losses: Mapping[int, Losses], seed: int) -> dict[int, Array]:
    """Rank → its loss in each resample."""
    chance = np.random.default_rng(seed)
    counts = next(iter(losses.values())).counts
    n = len(counts)
    numbers = sorted({len(own.sums) for own in losses.values()})
    made: dict[int, list[float]] = {rank: [] for rank in losses}
    for _ in range(_RESAMPLES):
        weights = np.bincount(chance.integers(0, n, n), minlength=n)
        whole = float(weights @ counts)
        picked = {k: chance.integers(0, k, k) for k in numbers}
        for rank, own in losses.items():
            seeds = own.sums @ weights / whole
            made[rank].append(_mean_of(seeds, picked[len(seeds)]))
    return {rank: np.asarray(values) for rank, values in made.items()}


def _mean_of(seeds: Array, picked: Array) -> float:
    """Of the picked ones, as far from the mean of all as makes the draws' variance the one that n seeds show: resampling alone
    gives (n - 1)/n of it, which for three seeds is a third too little."""
    n, middle = len(seeds), float(seeds.mean())
    return middle if n == 1 else middle + math.sqrt(n / (n - 1)) * (float(seeds[picked].mean()) - middle)


def _score(value: float, draws: Array) -> Score:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Score(value, float(low), float(high))
