"""Intervals of metrics on held-out items, for candidates and their differences; the rank that is enough, the candidates that are
worse. Knows only numbers.

The resampled unit is the item, since records with the same prompt are no independent evidence. There are two ways:

percentiles   a score of one run: the metric of resampled items, at levels widened for few items (Hesterberg 2015, section 5.2)
t values      a difference, or a score of several runs. Each item's part in the metric is its jackknife pseudo-value (Tukey
              1958). The quantiles are the bootstrap's, of studentised means of parts (Efron and Tibshirani 1993, chapter 12),
              and never less than Student's t. Differences are paired: parts of the same items, in the same resamples.

Runs of several seeds differ by more than their items. The variance of the mean of S runs is then a + b: a by items, and b by
seeds, the variance between runs over S. Few seeds estimate b badly. So a half-width is √(a + b) times the mean of both sources'
t quantiles, weighted by a and b (Cochran 1964, Biometrics 20, 191). benchmarks/intervals.py measures how often it errs. Student's
t is for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).

The recommended rank is the smallest whose loss exceeds the largest rank's by no more than a margin, with 95% confidence. Tests
start at the largest rank and end at the first that fails. Such a fixed sequence errs no more often than one test, whatever the
number of ranks (Maurer et al. 1995), so it needs no correction. Candidates of any kind are tested in all pairs together, because
these same items decide which one is the best.
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
_ERROR = 0.05  # chance that an interval errs, at either side


def figure(value: float, digits: int = 3) -> str:
    """Return a figure to three decimals, and of a small one two significant digits: 0.412, 0.00041."""
    if value == 0 or not math.isfinite(value) or abs(value) >= 10.0 ** (1 - digits):
        return f"{value:.{digits}f}"
    return f"{value:.{1 - math.floor(math.log10(abs(value)))}f}"


@dataclass(frozen=True)
class Score:
    """A figure and its 95% interval over items; nan where a single item allows none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{figure(self.value)} [{figure(self.low)}, {figure(self.high)}]"

    def plain(self) -> dict[str, float]:
        """Return the three figures by name."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class ItemScore(Score):
    """A score of one run, with each item's part in it."""

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
    limits: tuple[float, float] = (-math.inf, math.inf)
    """The least and the largest value that there can be. No interval goes beyond them."""

    @property
    def value(self) -> float:
        """The mean over runs."""
        return float(self.values.mean())

    @property
    def items(self) -> int:
        """The number of items."""
        return int(self.parts.shape[1])

    def less(self, other: Measured) -> Measured:
        """Return the difference on each item, run by run: runs of one seed saw the same records in the same order.

        A seed that only one of them has is left out. Raises ValueError where they share no seed or differ in items.
        """
        both = [seed for seed in self.seeds if seed in other.seeds]
        if not both or self.items != other.items:
            raise ValueError(f"These runs have no pairs: seeds {self.seeds} and {other.seeds}.")
        left, right = ([measured.seeds.index(seed) for seed in both] for measured in (self, other))
        limits = self.limits[0] - other.limits[1], self.limits[1] - other.limits[0]
        return Measured(
            self.values[left] - other.values[right], self.parts[left] - other.parts[right], tuple(both), limits
        )

    def interval(self) -> Score:
        """Return the mean over runs with its 95% interval, which with one run leaves out the variation between seeds."""
        if self.items < 2:
            return Score(self.value, math.nan, math.nan)
        t = _t_values(self.parts.mean(0)[None])[0]
        plain = quantile(_ERROR / 2, self.items - 1)
        up, down = (
            max(plain, _finite(np.quantile(sign * t, 1 - _ERROR / 2, method="higher"), plain)) for sign in (-1, 1)
        )
        return self.within(*(self.value + sign * _half(self, c, _ERROR / 2) for sign, c in ((-1, down), (1, up))))

    def within(self, low: float, high: float) -> Score:
        """Return the mean over runs with this interval, cut at the limits."""
        least, most = self.limits
        return Score(self.value, min(max(low, least), self.value), max(min(high, most), self.value))


def paired(score: ItemScore, other: ItemScore, limits: tuple[float, float]) -> Score:
    """Return a score less another one of the same items, each of one run. limits: as `Measured` has them, of one score."""
    return of_one_run(score, limits).less(of_one_run(other, limits)).interval()


def of_one_run(score: ItemScore, limits: tuple[float, float]) -> Measured:
    """Return a score of one run as a metric of one candidate."""
    return Measured(np.array([score.value]), score.parts[None], (0,), limits)


def together(differences: Sequence[Measured]) -> list[Score]:
    """Return differences with intervals that all hold at once with 95% confidence.

    Their quantile is of the largest of the bootstrap's t values (Romano and Wolf 2005).
    """
    if not differences:
        return []
    count, items = len(differences), differences[0].items
    if items < 2:
        return [Score(d.value, math.nan, math.nan) for d in differences]
    largest = np.abs(_t_values(np.stack([d.parts.mean(0) for d in differences]))).max(0)
    at_once = _finite(np.quantile(largest, 1 - _ERROR, method="higher"), quantile(_ERROR / 2 / count, items - 1))
    halves = [_half(d, at_once, tail(at_once, items - 1)) for d in differences]
    return [d.within(d.value - half, d.value + half) for d, half in zip(differences, halves, strict=True)]


def _half(measured: Measured, by_items: float, error: float) -> float:
    """Half an interval's width. by_items: the t quantile over items. error: the chance to err at each side."""
    runs, items = measured.parts.shape
    a = float(measured.parts.mean(0).var(ddof=1)) / items
    b = float(measured.values.var(ddof=1)) / runs if runs > 1 else 0.0
    by_seeds = quantile(error, runs - 1) if b else 0.0
    return (a * by_items + b * by_seeds) / math.sqrt(a + b) if a + b else 0.0


def _t_values(parts: Array) -> Array:
    """The studentised means [comparisons, resamples] of resampled parts [comparisons, items]; infinite where all drawn items are
    equal."""
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


def _finite(value: np.floating[Any], otherwise: float) -> float:
    return float(value) if math.isfinite(value) else otherwise


def percentiles(value: float, draws: Array, items: int) -> Score:
    """Return a value with the 95% interval of its draws [resamples]. Draws where it is undefined are left out."""
    draws = draws[np.isfinite(draws)]
    if items < 2 or not len(draws):
        return Score(value, math.nan, math.nan)
    level = NormalDist().cdf(-math.sqrt(items / (items - 1)) * quantile(_ERROR / 2, items - 1))
    low, high = np.quantile(draws, [level, 1 - level])
    return Score(value, float(low), float(high))


def resampled_weights(items: int) -> Iterator[Array]:
    """Yield how often each item is drawn, [resamples, items], a few megabytes at a time.

    They are the same for every metric and candidate.
    """
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
    """Return the sums […, items] of values […, records] over each item's records. items: [records], numbers from 0."""
    count = int(items.max()) + 1
    rows = values.reshape(-1, len(items))
    sums = [np.bincount(items, row, minlength=count) for row in rows]
    return np.array(sums).reshape(*values.shape[:-1], count)


def shortened(parts: Array) -> list[float]:
    """Return the parts in six digits, for a file."""
    return [float(f"{part:.6g}") for part in parts]


def of_losses(sums: Array, counts: Array, items: Array | None = None, seeds: Sequence[int] | None = None) -> Measured:
    """Return the loss per prediction of one candidate: Σ sums / Σ counts.

    Args:
        sums: [runs, records], the sum of the losses of each record's predictions.
        counts: [records], the number of each record's predictions.
        items: [records], the number of each record's item. Default: a record is an item.
        seeds: [runs]. Default: 0, 1, …
    """
    sums, counts = np.atleast_2d(np.asarray(sums, float)), np.asarray(counts, float)
    if items is not None:
        sums, counts = by_item(sums, np.asarray(items)), by_item(counts, np.asarray(items))
    values = sums.sum(1) / counts.sum()
    number = counts.shape[0]
    others = (sums.sum(1, keepdims=True) - sums) / (counts.sum() - counts) if number > 1 else sums / counts
    parts = number * values[:, None] - (number - 1) * others
    return Measured(values, parts, tuple(range(len(sums)) if seeds is None else seeds), (0.0, math.inf))


def tail(t: float, dof: int) -> float:
    """Return P(T > t) of Student's t with `dof` degrees of freedom, for t ≥ 0."""
    angle = math.atan(t / math.sqrt(dof))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    # Each term of the series is its predecessor times cos² and a ratio of neighbouring whole numbers
    steps = np.arange(2 if dof % 2 else 1, dof - 1, 2, dtype=float)
    terms = np.cumprod(square * steps / (steps + 1))
    if dof % 2 == 0:
        return 0.5 * (1 - sine * (1 + float(terms.sum())))
    series = 0.0 if dof == 1 else sine * math.cos(angle) * (1 + float(terms.sum()))
    return 0.5 - (angle + series) / math.pi


@functools.cache
def quantile(above: float, dof: int) -> float:
    """Return the t with P(T > t) = `above`, for `above` in (0, 0.5)."""
    low, high = 0.0, 1.0
    while tail(high, dof) > above:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, dof) > above else (low, middle)
    return (low + high) / 2


ERROR_RATE = "error rate"
"""The figure that decides about classes: the share of records with a wrong answer, which is the mean 0-1 loss."""


def errors_of(accuracy: Measured) -> Measured:
    """Return the error rate, from the accuracy on the same items."""
    return Measured(1.0 - accuracy.values, 1.0 - accuracy.parts, accuracy.seeds, (0.0, 1.0))


@dataclass(frozen=True)
class Tested:
    """One rank against the largest."""

    rank: int
    loss: Score
    """Error rate, where that decides."""
    difference: Score
    """Its loss less the largest rank's, paired by item and by seed."""
    enough: bool
    """True if the interval of the difference ends below the margin."""


@dataclass(frozen=True)
class Choice:
    """The smallest rank that is enough, and the tests that show it."""

    rank: int
    margin: float
    """The most that a loss may be worse, in the loss's unit."""
    tested: list[Tested]
    """All ranks, from the smallest."""
    by: str = "loss"
    """The figure that decides: the loss, or ERROR_RATE."""


def chosen(losses: Mapping[int, Measured], margin: float, least: float = 0.0, *, by: str = "loss") -> Choice:
    """Choose by the losses of each rank on the same items.

    `margin` is a share of the largest rank's loss, for example 0.01. Where that is less than `least`, in the loss's unit, it is
    that: of a loss near 0 any share is so little that no smaller rank would do. Of an error rate it is a share of the records.
    """
    ranks = sorted(losses)
    largest = losses[max(ranks)]
    most = margin if by == ERROR_RATE else max(margin * largest.value, least if margin else 0.0)
    tested = []
    for rank in ranks:
        difference = losses[rank].less(largest).interval()
        tested.append(Tested(rank, losses[rank].interval(), difference, difference.high <= most))
    enough = [test.rank for test in itertools.takewhile(lambda test: test.enough, reversed(tested))]
    return Choice(min(enough, default=max(ranks)), most, tested, by)


@dataclass(frozen=True)
class Compared:
    """One candidate beside the best, or beside another one that it is compared with."""

    name: str
    score: Score
    """With the 95% interval of this candidate alone."""
    difference: Score
    """Its score less the other one's; the intervals of all pairs hold together."""
    worse: bool
    """True if the whole interval of the difference is on the worse side of 0."""

    @property
    def better(self) -> bool:
        """True if the whole interval is on the better side of 0, which it is for none beside the best."""
        return not self.worse and (self.difference.low > 0 or self.difference.high < 0)


def compared(
    measured: Mapping[str, Measured], *, more_is_better: bool = False, beside: str | None = None
) -> list[Compared]:
    """Return the candidates from best to worst; of equal ones the first in `measured`. A metric is a loss by default.

    beside: the candidate that all are compared with, which then comes first. Default: the best one.
    """
    sign = -1.0 if more_is_better else 1.0
    ranked = sorted(measured, key=lambda name: sign * measured[name].value)
    first = ranked[0] if beside is None else beside
    others = [name for name in ranked if name != first]
    pairs = list(combinations([first, *others], 2))
    differences = dict(zip(pairs, together([measured[b].less(measured[a]) for a, b in pairs]), strict=True))
    rows = [Compared(first, measured[first].interval(), Score(0.0, 0.0, 0.0), False)]
    for name in others:
        difference = differences[first, name]
        worse = difference.high < 0 if more_is_better else difference.low > 0
        rows.append(Compared(name, measured[name].interval(), difference, worse))
    return rows
