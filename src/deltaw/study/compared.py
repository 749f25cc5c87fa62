"""Candidates of any kind compared by one metric of the same held-out items: which are worse than the best one, and which are
not shown to be. Knows numbers alone.

The best one is known only by these very items. So all pairs are tested together: the intervals of all their differences hold at
once with 95% confidence, and looking at the pairs with the best one afterwards needs no further correction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from deltaw.study.resampling import Measured, Score, together


@dataclass(frozen=True)
class Compared:
    """One candidate beside the best."""

    name: str
    score: Score
    """With its own 95% interval."""
    difference: Score
    """Its score less the best one's; the intervals of all pairs hold together."""
    worse: bool
    """The whole interval of the difference is on the worse side of 0."""


def compared(measured: Mapping[str, Measured], *, more_is_better: bool = False) -> list[Compared]:
    """The best one first, then by score; of equals the one that was given first. By default the metric is a loss."""
    sign = -1.0 if more_is_better else 1.0
    best, *others = sorted(measured, key=lambda name: sign * measured[name].value)
    pairs = list(combinations([best, *others], 2))
    found = dict(zip(pairs, together([measured[b].less(measured[a]) for a, b in pairs]), strict=True))
    rows = [Compared(best, measured[best].interval(), Score(0.0, 0.0, 0.0), False)]
    for name in others:
        difference = found[best, name]
        worse = difference.high < 0 if more_is_better else difference.low > 0
        rows.append(Compared(name, measured[name].interval(), difference, worse))
    return rows
