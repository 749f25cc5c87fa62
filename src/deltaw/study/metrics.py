"""Scores of predictions against references, with bootstrap 95% intervals over items. Knows no model."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.errors import ConfigError, nearest

_RESAMPLES = 1000
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Score:
    """A figure and its 95% interval (percentile bootstrap over items, 1,000 resamples)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resampled(value: float, of: Callable[[Array], Array], n: int, *, seed: int = 0) -> Score:
    """A figure of n items: its value, and `of` many resamples at once, given as item numbers [resamples, n]. Those that it is
    undefined for are left out."""
    with np.errstate(all="ignore"):  # of a resample of one class alone
        draws = np.concatenate([of(picks) for picks in drawn(n, seed, _RESAMPLES)])
    draws = draws[np.isfinite(draws)]
    low, high = np.percentile(draws, [2.5, 97.5]) if len(draws) else (float("nan"), float("nan"))
    return Score(float(value), float(low), float(high))


def drawn(n: int, seed: int, resamples: int) -> Iterator[Array]:
    """Numbers of n items drawn with replacement, [resamples, n], as many resamples at a time as take some megabytes."""
    chance, left = np.random.default_rng(seed), resamples
    while left:
        count = min(left, max(1, 1_000_000 // n))
        yield chance.integers(0, n, (count, n))
        left -= count


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Score:
    """Σ numerators / Σ denominators over items, such as loss per token; denominators of 1 give a mean."""
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    value = float(top.sum() / bottom.sum())
    return resampled(value, lambda picks: top[picks].sum(1) / bottom[picks].sum(1), len(top), seed=seed)


def perplexity(loss: Score) -> Score:
    """exp of a loss per token in nats."""
    return Score(*(float(np.exp(v)) for v in (loss.value, loss.low, loss.high)))


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Share of predictions equal to one of their references, surrounding space aside."""
    hits = [float(p.strip() in {r.strip() for r in refs}) for p, refs in zip(predictions, references, strict=True)]
    return ratio(hits, [1.0] * len(hits))


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Corpus BLEU over items with all their references, 0–100: sacrebleu, lower-cased, 13a, unsmoothed (which agrees with
    the E2E challenge's scorer)."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none")
    most = max(len(refs) for refs in references)
    columns: Any = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    result = metric.corpus_score(list(predictions), columns, n_bootstrap=_RESAMPLES)
    half = getattr(result, "_ci", 0.0)
    return Score(float(result.score), float(result.score - half), float(result.score + half))


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Mean ROUGE-L F1 of each prediction with its best reference, 0–1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    best = [
        scorer.score_multi(list(refs), p)["rougeL"].fmeasure for p, refs in zip(predictions, references, strict=True)
    ]
    return ratio(best, [1.0] * len(best))


class _Counts:
    """How often each class is said, is wanted and is both, in each resample: [resamples, classes]. All that F1 and Matthews'
    correlation are made of."""

    def __init__(self, predicted: Sequence[int], wanted: Sequence[int], classes: int) -> None:
        self.y, self.t, self.classes = np.asarray(predicted), np.asarray(wanted), classes

    def of(self, picks: Array) -> tuple[Array, Array, Array]:
        y, t = self.y[picks], self.t[picks]
        return self._each(y), self._each(t), self._each(np.where(y == t, y, self.classes))

    def _each(self, classes: Array) -> Array:
        """Of each row, where a number past the last class counts for none."""
        width = self.classes + 1
        flat = (classes + width * np.arange(len(classes))[:, None]).ravel()
        return np.bincount(flat, minlength=width * len(classes)).reshape(-1, width)[:, :-1].astype(float)

    def f1(self, picks: Array) -> Array:
        said, wanted, both = self.of(picks)
        own = np.where(said + wanted > 0, 2 * both / (said + wanted), np.nan)
        return np.nan_to_num(own[:, 1]) if self.classes == 2 else np.nanmean(own, axis=1)

    def matthews(self, picks: Array) -> Array:
        said, wanted, both = self.of(picks)
        n = picks.shape[1]
        shared = both.sum(1) * n - (said * wanted).sum(1)
        spread = np.sqrt((n**2 - (said**2).sum(1)) * (n**2 - (wanted**2).sum(1)))
        return np.where(spread > 0, shared / spread, 0.0)


def accuracy(predicted: Sequence[int], wanted: Sequence[int], classes: int) -> Score:
    """Share of classes that are right."""
    return ratio([float(p == w) for p, w in zip(predicted, wanted, strict=True)], [1.0] * len(wanted))


def f1(predicted: Sequence[int], wanted: Sequence[int], classes: int) -> Score:
    """scikit-learn's F1: of two classes the second one's (GLUE's), of more the mean over the classes."""
    from sklearn.metrics import f1_score

    average = "binary" if classes == 2 else "macro"
    value = f1_score(wanted, predicted, average=average, zero_division=0.0)
    return resampled(value, _Counts(predicted, wanted, classes).f1, len(wanted))


def matthews(predicted: Sequence[int], wanted: Sequence[int], classes: int) -> Score:
    """scikit-learn's Matthews correlation, −1 to 1."""
    from sklearn.metrics import matthews_corrcoef

    value = matthews_corrcoef(wanted, predicted)
    return resampled(value, _Counts(predicted, wanted, classes).matthews, len(wanted))


def pearson(predicted: Sequence[float], wanted: Sequence[float]) -> Score:
    """scipy's Pearson correlation, −1 to 1."""
    from scipy.stats import pearsonr

    y, t = np.asarray(predicted, float), np.asarray(wanted, float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant predictions
        value = pearsonr(y, t).statistic
    return resampled(value, lambda picks: _correlations(y[picks], t[picks]), len(t))


def spearman(predicted: Sequence[float], wanted: Sequence[float]) -> Score:
    """scipy's Spearman rank correlation, −1 to 1."""
    from scipy.stats import rankdata, spearmanr

    y, t = np.asarray(predicted, float), np.asarray(wanted, float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = spearmanr(y, t).statistic
    return resampled(value, lambda picks: _correlations(rankdata(y[picks], axis=1), rankdata(t[picks], axis=1)), len(t))


def _correlations(y: Array, t: Array) -> Array:
    """Pearson's, of each row."""
    y, t = y - y.mean(1, keepdims=True), t - t.mean(1, keepdims=True)
    return (y * t).sum(1) / np.sqrt((y * y).sum(1) * (t * t).sum(1))


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], Score]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge_l": rouge_l,
}
METRICS = ("loss", "perplexity", *TEXT_METRICS)
CLASS_METRICS: dict[str, Callable[[Sequence[int], Sequence[int], int], Score]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
}
NUMBER_METRICS: dict[str, Callable[[Sequence[float], Sequence[float]], Score]] = {
    "pearson": pearson,
    "spearman": spearman,
}
MORE_IS_BETTER = {*TEXT_METRICS, *CLASS_METRICS, *NUMBER_METRICS}
"""Metrics of which more is better."""
_PACKAGES = {
    "bleu": "sacrebleu", "rouge_l": "rouge_score", "f1": "sklearn", "matthews": "sklearn", "pearson": "scipy", 
    "spearman": "scipy",
}  # fmt: skip


def check_metrics(names: Sequence[str], known: Sequence[str] = METRICS) -> None:
    """Raise ConfigError for a metric that is not known or whose package is not installed."""
    unknown = [n for n in names if n not in known]
    if unknown:
        named = "; ".join(f"{n!r}{nearest(n, known)}" for n in unknown)
        raise ConfigError(f"Unknown metric {named}. There are: {', '.join(known)}.")
    missing = [name for name in names if not installed(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} needs a package that is not installed: pip install 'deltaw[eval]'")


def installed(name: str) -> bool:
    """Whether the package that computes this metric is there."""
    return name not in _PACKAGES or importlib.util.find_spec(_PACKAGES[name]) is not None
