"""Scores of predictions against references, with 95% intervals over items. Knows no model.

Every score is a function of how often each item counts. For its value each item counts once, for its interval as often as it is
drawn. For an item's part in it, all items but that one count once. `items` are the numbers of the records' items from 0; by
default each record is an item.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deltaw.errors import ConfigError, nearest
from deltaw.runs.evaluation.bootstrap import Array, ItemScore, by_item, percentiles, resampled_weights

Items = Sequence[int] | None


class Statistic(Protocol):
    """A figure as a function of how often each item counts."""

    def of(self, weights: Array) -> Array:
        """Return the figure [resamples] for weights [resamples, items]."""

    def without_each(self) -> Array:
        """Return the figure [items] without each item."""


@dataclass(frozen=True)
class Sums:
    """A figure that is a function of sums over items."""

    sums: Array
    """[items, sums]"""
    figure: Callable[[Array], Array]
    """[…, sums] → […]"""

    def of(self, weights: Array) -> Array:
        return self.figure(weights @ self.sums)

    def without_each(self) -> Array:
        return self.figure(self.sums.sum(0) - self.sums)


def scored(value: float, statistic: Statistic, items: int) -> ItemScore:
    """Return a figure of so many items with its interval, and each item's part.

    Resamples where it is undefined are left out. A part that is undefined is the figure's value.
    """
    with np.errstate(all="ignore"):  # a resample may have items of one class alone
        draws = np.concatenate([statistic.of(weights) for weights in resampled_weights(items)])
        others = statistic.without_each()
    interval = percentiles(float(value), draws, items)
    parts = items * value - (items - 1) * np.where(np.isfinite(others), others, value)
    return ItemScore(float(value), interval.low, interval.high, parts)


def ratio(numerators: Sequence[float], denominators: Sequence[float], items: Items = None) -> ItemScore:
    """Return Σ numerators / Σ denominators over records, for example the loss per token."""
    numbers = _numbers(items, len(numerators))
    sums = by_item(np.array([numerators, denominators], float), numbers).T
    top, bottom = sums.sum(0)
    return scored(float(top / bottom), Sums(sums, lambda s: s[..., 0] / s[..., 1]), len(sums))


def mean(values: Sequence[float], items: Items = None) -> ItemScore:
    """Return the mean over records."""
    return ratio(values, [1.0] * len(values), items)


def perplexity(loss: ItemScore) -> ItemScore:
    """Return exp of a loss per token in nats."""
    count = len(loss.parts)
    with np.errstate(over="ignore"):  # it is infinite then
        value, low, high = (float(np.exp(v)) for v in (loss.value, loss.low, loss.high))
        others = np.exp((count * loss.value - loss.parts) / max(count - 1, 1))
    return ItemScore(value, low, high, count * value - (count - 1) * others)


def _numbers(items: Items, records: int) -> Array:
    return np.arange(records) if items is None else np.asarray(items)


# --- texts -------------------------------------------------------------------------------------------------------


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]], items: Items = None) -> ItemScore:
    """Return the share of predictions equal to one of their references, but for surrounding space."""
    hits = [float(p.strip() in {r.strip() for r in refs}) for p, refs in zip(predictions, references, strict=True)]
    return mean(hits, items)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], items: Items = None) -> ItemScore:
    """Return corpus BLEU with all references, 0–100: sacrebleu's, lower-cased, 13a, unsmoothed, as the E2E challenge's."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none")
    most = max(len(refs) for refs in references)
    # sacrebleu takes None for a missing reference, which its types do not say
    columns: Any = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    value = float(metric.corpus_score(list(predictions), columns).score)
    rows = []
    for prediction, refs in zip(predictions, references, strict=True):
        one = metric.corpus_score([prediction], [[ref] for ref in refs])
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    sums = by_item(np.array(rows, float).T, _numbers(items, len(rows))).T
    return scored(value, Sums(sums, _bleu_of), len(sums))


def _bleu_of(sums: Array) -> Array:
    """BLEU [...] of sums [..., 10]: matches [4], n-grams [4], words of the predictions, words of the references."""
    order = (sums.shape[-1] - 2) // 2
    matches, totals, said, wanted = sums[..., :order], sums[..., order:-2], sums[..., -2], sums[..., -1]
    logs = np.log(matches / np.maximum(totals, 1)).mean(-1)
    short = np.where(said < wanted, 1 - wanted / np.maximum(said, 1), 0.0)
    return np.where(matches.min(-1) > 0, 100 * np.exp(logs + short), 0.0)


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]], items: Items = None) -> ItemScore:
    """Return the mean ROUGE-L F1 of each prediction with its best reference, 0–1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    best = [
        scorer.score_multi(list(refs), p)["rougeL"].fmeasure for p, refs in zip(predictions, references, strict=True)
    ]
    return mean(best, items)


# --- classes -----------------------------------------------------------------------------------------------------


def accuracy(predicted: Sequence[int], wanted: Sequence[int], classes: int, items: Items = None) -> ItemScore:
    """Return the share of classes that are right."""
    return mean([float(p == w) for p, w in zip(predicted, wanted, strict=True)], items)


def f1(predicted: Sequence[int], wanted: Sequence[int], classes: int, items: Items = None) -> ItemScore:
    """Return scikit-learn's F1: the second class's of two (as GLUE), the mean over classes of more."""
    from sklearn.metrics import f1_score

    average = "binary" if classes == 2 else "macro"
    value = f1_score(wanted, predicted, average=average, zero_division=0.0)
    counts = _counts(predicted, wanted, classes, items)
    return scored(value, Sums(counts, _f1_of), len(counts))


def matthews(predicted: Sequence[int], wanted: Sequence[int], classes: int, items: Items = None) -> ItemScore:
    """Return scikit-learn's Matthews correlation, −1 to 1."""
    from sklearn.metrics import matthews_corrcoef

    counts = _counts(predicted, wanted, classes, items)
    # scikit-learn warns of one class alone, and says 0 as well
    value = matthews_corrcoef(wanted, predicted) if len({*wanted, *predicted}) > 1 else 0.0
    return scored(value, Sums(counts, _matthews_of), len(counts))


def _counts(predicted: Sequence[int], wanted: Sequence[int], classes: int, items: Items) -> Array:
    """Counts of each class as predicted, as right and as both, [items, 3 · classes]: enough for F1 and Matthews' correlation."""
    y, t = np.asarray(predicted), np.asarray(wanted)
    numbers = _numbers(items, len(t))
    count = int(numbers.max()) + 1

    def counted(values: Array, rows: Array) -> Array:
        return np.bincount(rows * classes + values, minlength=count * classes).reshape(count, classes)

    both = y == t
    return np.hstack([counted(y, numbers), counted(t, numbers), counted(t[both], numbers[both])]).astype(float)


def _f1_of(counts: Array) -> Array:
    said, wanted, both = np.split(counts, 3, axis=-1)
    by_class = np.where(said + wanted > 0, 2 * both / (said + wanted), np.nan)
    return np.nan_to_num(by_class[..., 1]) if by_class.shape[-1] == 2 else _mean_of_defined(by_class)


def _mean_of_defined(values: Array) -> Array:
    """The mean over the last axis, without nan."""
    there = np.isfinite(values)
    return np.asarray(np.where(there, values, 0.0).sum(-1) / there.sum(-1))


def _matthews_of(counts: Array) -> Array:
    said, wanted, both = np.split(counts, 3, axis=-1)
    n = wanted.sum(-1)
    shared = both.sum(-1) * n - (said * wanted).sum(-1)
    spread = np.sqrt((n**2 - (said**2).sum(-1)) * (n**2 - (wanted**2).sum(-1)))
    return np.where(spread > 0, shared / spread, 0.0)


# --- quantities --------------------------------------------------------------------------------------------------


def pearson(predicted: Sequence[float], wanted: Sequence[float], items: Items = None) -> ItemScore:
    """Return scipy's Pearson correlation, −1 to 1."""
    from scipy.stats import pearsonr

    def as_they_are(values: Array, weights: Array) -> Array:
        return np.broadcast_to(values, weights.shape)

    return _correlated(lambda y, t: float(pearsonr(y, t).statistic), as_they_are, predicted, wanted, items)


def spearman(predicted: Sequence[float], wanted: Sequence[float], items: Items = None) -> ItemScore:
    """Return scipy's Spearman rank correlation, −1 to 1. Each resample is ranked again."""
    from scipy.stats import spearmanr

    return _correlated(lambda y, t: float(spearmanr(y, t).statistic), _ranked, predicted, wanted, items)


def _correlated(
    of: Callable[[Array, Array], float], placed: Callable[[Array, Array], Array], predicted: Sequence[float],
    wanted: Sequence[float], items: Items,
) -> ItemScore:  # fmt: skip
    y, t = np.asarray(predicted, float), np.asarray(wanted, float)
    numbers = _numbers(items, len(t))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant predictions
        value = of(y, t)
    return scored(value, _Correlation(y, t, numbers, placed), int(numbers.max()) + 1)


@dataclass(frozen=True)
class _Correlation:
    """The correlation of two quantities of each record, or of what `placed` makes of them at given weights."""

    y: Array
    t: Array
    items: Array
    placed: Callable[[Array, Array], Array]

    def of(self, weights: Array) -> Array:
        weights = weights[:, self.items]
        y, t = (self._centred(self.placed(values, weights), weights) for values in (self.y, self.t))
        return (weights * y * t).sum(1) / np.sqrt((weights * y * y).sum(1) * (weights * t * t).sum(1))

    def _centred(self, values: Array, weights: Array) -> Array:
        """The values less their mean; exactly 0 if all that count are equal."""
        counted = weights > 0
        most, least = (f(1) for f in (np.where(counted, values, -np.inf).max, np.where(counted, values, np.inf).min))
        middle = np.where(most == least, most, (weights * values).sum(1) / weights.sum(1))
        return np.where(counted, values - middle[:, None], 0.0)

    def without_each(self) -> Array:
        return np.concatenate([self.of(weights) for weights in _all_but_one(int(self.items.max()) + 1)])


def _all_but_one(items: int) -> Iterator[Array]:
    """Yield weights [some, items] in which all items but one count once, until each was left out."""
    rows = max(1, 1_000_000 // items)
    for first in range(0, items, rows):
        yield 1.0 - np.eye(min(rows, items - first), items, first)


def _ranked(values: Array, weights: Array) -> Array:
    """The mean rank [resamples, records] of each record if records count by weights [resamples, records]."""
    levels, places = np.unique(values, return_inverse=True)
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(len(levels)))
    alike = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = np.cumsum(alike, 1) - alike + (alike + 1) / 2
    return np.asarray(ranks[:, places])


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]], Items], ItemScore]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge_l": rouge_l,
}
METRICS = ("loss", "perplexity", *TEXT_METRICS)
CLASS_METRICS: dict[str, Callable[[Sequence[int], Sequence[int], int, Items], ItemScore]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
}
NUMBER_METRICS: dict[str, Callable[[Sequence[float], Sequence[float], Items], ItemScore]] = {
    "pearson": pearson,
    "spearman": spearman,
}
MORE_IS_BETTER = {*TEXT_METRICS, *CLASS_METRICS, *NUMBER_METRICS}
"""Metrics whose larger values are better."""
_RANGES = {"bleu": (0.0, 100.0), "matthews": (-1.0, 1.0), **dict.fromkeys(NUMBER_METRICS, (-1.0, 1.0))}
_RANGES |= dict.fromkeys(("loss", "perplexity"), (0.0, float("inf")))


def limits(metric: str) -> tuple[float, float]:
    """Return the least and the greatest value that a metric can have."""
    return _RANGES.get(metric, (0.0, 1.0))


_PACKAGES = {
    "bleu": "sacrebleu", "rouge_l": "rouge_score", "f1": "sklearn", "matthews": "sklearn", "pearson": "scipy", 
    "spearman": "scipy",
}  # fmt: skip


def check_metrics(names: Sequence[str], known: Sequence[str] = METRICS) -> None:
    """Raise ConfigError for an unknown metric, or one whose package is not installed."""
    unknown = [n for n in names if n not in known]
    if unknown:
        named = "; ".join(f"{n!r}{nearest(n, known)}" for n in unknown)
        raise ConfigError(f"Unknown metric {named}. There are: {', '.join(known)}.")
    missing = [name for name in names if not installed(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} needs a package that is not installed: pip install 'deltaw[eval]'")


def installed(name: str) -> bool:
    """Return whether the package for this metric is installed."""
    return name not in _PACKAGES or importlib.util.find_spec(_PACKAGES[name]) is not None
