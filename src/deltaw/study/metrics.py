"""Scores of predictions against references, with bootstrap 95% intervals over items. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.errors import ConfigError, nearest

_RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """A figure and its 95% interval (percentile bootstrap over items, 1,000 resamples)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Score:
    """Σ numerators / Σ denominators over items, such as loss per token; denominators of 1 give a mean."""
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    picks = np.random.default_rng(seed).integers(0, len(top), (_RESAMPLES, len(top)))
    draws = top[picks].sum(1) / bottom[picks].sum(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Score(float(top.sum() / bottom.sum()), float(low), float(high))


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


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], Score]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge_l": rouge_l,
}
METRICS = ("loss", "perplexity", *TEXT_METRICS)


def check_metrics(names: Sequence[str]) -> None:
    """Raise ConfigError for a metric that is not known or whose package is not installed."""
    unknown = [n for n in names if n not in METRICS]
    if unknown:
        named = "; ".join(f"{n!r}{nearest(n, METRICS)}" for n in unknown)
        raise ConfigError(f"Unknown metric {named}. There are: {', '.join(METRICS)}.")
    packages = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}
    for name in names:
        if name in packages:
            try:
                __import__(packages[name])
            except ImportError as error:
                raise ConfigError(
                    f"{name} needs a package that is not installed: pip install 'deltaw[eval]'"
                ) from error
