"""Intervals of metrics on held-out items, for one candidate and for differences between candidates; and which rank is enough,
which candidate worse. Knows numbers alone.

The unit that is drawn again is the item: records with the same prompt are no independent evidence. Two ways:

percentiles   a score of one run: the metric of resampled items, at levels widened for few items (Hesterberg 2015, section 5.2)
t values      a difference, or a score of several runs. Each item's part in the metric is its jackknife pseudo-value (Tukey
              1958), and the quantiles are those of the bootstrap's studentised means of parts (Efron and Tibshirani 1993,
              chapter 12), never less than Student's t; paired: candidates' parts on the same items, in the same resamples.

Runs of several seeds differ by more than their items. The variance of the mean of S runs is then a + b, with a by items and b by
seeds, the runs' own variance over S. Few seeds tell b badly, so a half-width is √(a + b) times the mean of both sources' t
quantiles, weighted by a and b (Cochran 1964, Biometrics 20, 191). benchmarks/intervals.py measures how often it errs. Student's t
is for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).

The smallest rank is chosen whose loss is not worse than the largest one's by more than a margin, with 95% confidence. The tests
go down from the largest rank and end at the first that fails. Such a fixed sequence of tests errs as a whole no more often than
one test does, whatever the number of ranks (Maurer et al. 1995), so nothing is taken off for their number. Of candidates of any
kind all pairs are tested together: the best one is known only by these very items.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
RESAMPLES = 4000
_AT_ONCE = 1_000_000
_ERROR = 0.05  # of an interval, both sides together


@dataclass(frozen=True)
class Score:
    """A figure and its 95% interval over items; nan where a single item allows none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def plain(self) -> dict[str, float]:
        """The three figures by their names."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class ItemScore(Score):
    """A score of one run, with what each item adds to it."""

    parts: Array = field(repr=False, compare=False)
    """[items]: jackknife pseudo-values."""


@dataclass(frozen=True)
class Measured:
    """One metric of one candidate on all items, in one run or in several with a seed each."""

    values: Array
    """[runs]"""
    parts: Array
    """[runs, items]: jackknife pseudo-values."""
    seeds: tuple[int, ...]
    """[runs]"""

    @property
    def value(self) -> float:
        """The mean over runs."""
        return float(self.values.mean())

    @property
    def items(self) -> int:
        return int(self.parts.shape[1])

    def less(self, other: Measured) -> Measured:
        """The difference on each item, run by run: runs of one seed saw the same records in the same order. A seed that only one
        of the two has is left out."""
        both = [seed for seed in self.seeds if seed in other.seeds]
        if not both or self.items != other.items:
            raise ValueError(f"These runs have no pairs: seeds {self.seeds} and {other.seeds}.")
        mine, its = ([own.seeds.index(seed) for seed in both] for own in (self, other))
        return Measured(self.values[mine] - other.values[its], self.parts[mine] - other.parts[its], tuple(both))

    def interval(self) -> Score:
        """The mean over runs with its own 95% interval. With one run, what another seed would change is not in it."""
        if self.items < 2:
            return Score(self.value, math.nan, math.nan)
        t = _t_values(self.parts.mean(0)[None])[0]
        plain = quantile(_ERROR / 2, self.items - 1)
        up, down = (
            max(plain, _finite(np.quantile(sign * t, 1 - _ERROR / 2, method="higher"), plain)) for sign in (-1, 1)
        )
        low, high = (self.value + sign * _half(self, c, _ERROR / 2) for sign, c in ((-1, down), (1, up)))
        return Score(self.value, low, high)


def paired(score: ItemScore, other: ItemScore) -> Score:
    """A score less another one of the same items, each of one run."""
    first, second = (Measured(np.array([s.value]), s.parts[None], (0,)) for s in (score, other))
    return first.less(second).interval()


def together(differences: Sequence[Measured]) -> list[Score]:
    """Differences with intervals that all hold at once with 95% confidence: by the largest of the bootstrap's t values (Romano
    and Wolf 2005)."""
    if not differences:
        return []
    count, items = len(differences), differences[0].items
    if items < 2:
        return [Score(each.value, math.nan, math.nan) for each in differences]
    largest = np.abs(_t_values(np.stack([each.parts.mean(0) for each in differences]))).max(0)
    at_once = _finite(np.quantile(largest, 1 - _ERROR, method="higher"), quantile(_ERROR / 2 / count, items - 1))
    halves = [_half(each, at_once, tail(at_once, items - 1)) for each in differences]
    return [Score(d.value, d.value - half, d.value + half) for d, half in zip(differences, halves, strict=True)]


def _half(measured: Measured, by_items: float, error: float) -> float:
    """Half an interval's width: `by_items` is the t quantile over items, `error` that of each side."""
    runs, items = measured.parts.shape
    a = float(measured.parts.mean(0).var(ddof=1)) / items
    b = float(measured.values.var(ddof=1)) / runs if runs > 1 else 0.0
    by_seeds = quantile(error, runs - 1) if b else 0.0
    return (a * by_items + b * by_seeds) / math.sqrt(a + b) if a + b else 0.0


def _t_values(parts: Array) -> Array:
    """[comparisons, resamples]: the studentised means of resampled parts [comparisons, items]; infinite where all items drawn are
    alike."""
    items = parts.shape[1]
    parts = parts - parts.mean(1, keepdims=True)
    scale = np.maximum(np.abs(parts).max(1), np.finfo(float).tiny)[:, None]
    parts = parts / scale
    drawn = []
    for weights in resampled_weights(items):
        means = weights @ parts.T / items
        variances = (weights @ (parts**2).T / items - means**2) / (items - 1)
        alike = variances < 1e-12
        ratios = means / np.sqrt(np.where(alike, 1.0, variances))
        drawn.append(np.where(alike, np.where(np.abs(means) < 1e-12, 0.0, np.copysign(np.inf, means)), ratios))
    return np.concatenate(drawn).T


def _finite(found: Any, otherwise: float) -> float:
    return float(found) if math.isfinite(found) else otherwise


def percentiles(value: float, draws: Array, items: int) -> Score:
    """A value with the 95% interval of its resamples [resamples]; those that it is undefined for are left out."""
    draws = draws[np.isfinite(draws)]
    if items < 2 or not len(draws):
        return Score(value, math.nan, math.nan)
    level = NormalDist().cdf(-math.sqrt(items / (items - 1)) * quantile(_ERROR / 2, items - 1))
    low, high = np.quantile(draws, [level, 1 - level])
    return Score(value, float(low), float(high))


def resampled_weights(items: int) -> Iterator[Array]:
    """How often each item is drawn, [resamples, items]: the same ones for every metric and candidate, as many at a time as take
    some megabytes."""
    if items * RESAMPLES <= _AT_ONCE:
        yield _weights_of_few(items)
        return
    chance, left = np.random.default_rng(0), RESAMPLES
    while left:
        count = min(left, max(1, _AT_ONCE // items))
        yield _weights(chance, count, items)
        left -= count


@functools.lru_cache(maxsize=4)
def _weights_of_few(items: int) -> Array:
    weights = _weights(np.random.default_rng(0), RESAMPLES, items)
    weights.flags.writeable = False
    return weights


def _weights(chance: np.random.Generator, count: int, items: int) -> Array:
    places = chance.integers(0, items, (count, items)) + items * np.arange(count)[:, None]
    return np.bincount(places.ravel(), minlength=count * items).reshape(count, items).astype(float)


def by_item(values: Array, items: Array) -> Array:
    """[…, items]: the sums over each item's records of values […, records]. items: [records], their numbers from 0."""
    count = int(items.max()) + 1
    rows = values.reshape(-1, len(items))
    sums = [np.bincount(items, row, minlength=count) for row in rows]
    return np.array(sums).reshape(*values.shape[:-1], count)


def shortened(parts: Array) -> list[float]:
    """As a file has them: in six digits."""
    return [float(f"{part:.6g}") for part in parts]


def of_losses(sums: Array, counts: Array, items: Array | None = None, seeds: Sequence[int] | None = None) -> Measured:
    """The loss per prediction of one candidate: Σ sums / Σ counts.

    sums: [runs, records], of each record the sum of its predictions' losses. counts: [records], the number of its predictions.
    items: [records], each one's item; by default each record is its own. seeds: [runs], by default 0, 1, …
    """
    sums, counts = np.atleast_2d(np.asarray(sums, float)), np.asarray(counts, float)
    if items is not None:
        sums, counts = by_item(sums, np.asarray(items)), by_item(counts, np.asarray(items))
    values = sums.sum(1) / counts.sum()
    number = counts.shape[0]
    others = (sums.sum(1, keepdims=True) - sums) / (counts.sum() - counts) if number > 1 else sums / counts
    parts = number * values[:, None] - (number - 1) * others
    return Measured(values, parts, tuple(range(len(sums)) if seeds is None else seeds))


def tail(t: float, dof: int) -> float:
    """P(T > t) for t ≥ 0."""
    angle = math.atan(t / math.sqrt(dof))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    # Each term of the series is the one before times cos² and a ratio of neighbouring whole numbers
    steps = np.arange(2 if dof % 2 else 1, dof - 1, 2, dtype=float)
    terms = np.cumprod(square * steps / (steps + 1))
    if dof % 2 == 0:
        return 0.5 * (1 - sine * (1 + float(terms.sum())))
    series = 0.0 if dof == 1 else sine * math.cos(angle) * (1 + float(terms.sum()))
    return 0.5 - (angle + series) / math.pi


@functools.cache
def quantile(above: float, dof: int) -> float:
    """The t with P(T > t) = `above`, for `above` in (0, 0.5)."""
    low, high = 0.0, 1.0
    while tail(high, dof) > above:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, dof) > above else (low, middle)
    return (low + high) / 2


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
