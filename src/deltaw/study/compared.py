"""Candidates of any kind compared by their losses of the same held-out records: which are worse than the best one, and which are
not shown to be. Knows numbers alone.

The best one is known only by these very losses. So all pairs are tested together: the intervals of all their differences hold at
once with 95% confidence, by the largest of the bootstrap's t values (Romano & Wolf 2005), and looking at the pairs with the best
one afterwards needs no further correction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deltaw.study.metrics import Array, Score
from deltaw.study.resampling import Losses, draws, score_of


@dataclass(frozen=True)
class Compared:
    """One candidate beside the best."""

    name: str
    loss: Score
    """With its own 95% interval."""
    difference: Score
    """Its loss less the best one's; the intervals of all pairs hold together."""
    worse: bool
    """The interval of the difference is above 0."""


def compared(losses: Mapping[str, Losses], *, seed: int = 0) -> list[Compared]:
    """Rising by loss, so the best one is the first. Records and seeds are drawn again in pairs."""
    names = sorted(losses, key=lambda name: losses[name].value)
    values = np.array([losses[name].value for name in names])
    resampled = draws(losses, seed)
    made = np.stack([resampled[name] for name in names])
    widths = _widths(made - values[:, None])
    found = []
    for name, value, own, width in zip(names, values.tolist(), made, widths.tolist(), strict=True):
        above = value - float(values[0])
        difference = Score(above, above - width, above + width)
        found.append(Compared(name, score_of(value, own), difference, difference.low > 0))
    return found


def _widths(errors: Array) -> Array:
    """[candidates]: half the interval of each one's difference from the first. errors: [candidates, resamples]."""
    count = len(errors)
    spread = np.zeros((count, count))
    largest = np.zeros(errors.shape[1])
    for i in range(count):
        for j in range(i):
            of_pair = errors[i] - errors[j]
            spread[i, j] = of_pair.std()
            if spread[i, j]:
                largest = np.maximum(largest, np.abs(of_pair) / spread[i, j])
    return np.asarray(np.quantile(largest, 0.95) * spread[:, 0])
