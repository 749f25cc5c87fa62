"""Scores against values worked out by hand; intervals that mean something."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from deltaw.errors import ConfigError
from deltaw.study.metrics import (
    _RESAMPLES,
    Score,
    _Counts,
    bleu,
    check_metrics,
    drawn,
    exact_match,
    f1,
    matthews,
    pearson,
    perplexity,
    ratio,
    resampled,
    rouge_l,
    spearman,
)

LONG = "the tavern is a cheap pub near the river"


def test_exact_match_takes_any_reference_and_ignores_outer_space() -> None:
    score = exact_match([" a\n", "b", "c"], [["a"], ["x", "b"], ["C"]])
    assert score.value == pytest.approx(2 / 3)
    assert 0 <= score.low <= score.value <= score.high <= 1


def test_ratio_weighs_items_by_their_denominators() -> None:
    assert ratio([2.0, 30.0], [1.0, 10.0]).value == pytest.approx(32 / 11)


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 40)), min_size=1, max_size=30))
def test_an_interval_lies_within_the_items_and_is_the_same_every_time(items: list[tuple[float, int]]) -> None:
    tops, bottoms = [t for t, _ in items], [float(b) for _, b in items]
    score = ratio(tops, bottoms)
    each = [t / b for t, b in zip(tops, bottoms, strict=True)]
    assert min(each) - 1e-9 <= score.low <= score.high <= max(each) + 1e-9
    assert ratio(tops, bottoms) == score


def test_an_interval_narrows_with_more_items() -> None:
    def width(count: int) -> float:
        score = ratio([float(i % 2) for i in range(count)], [1.0] * count)
        return score.high - score.low

    assert width(400) < 0.6 * width(40)


def test_perplexity_is_e_to_the_loss() -> None:
    found = perplexity(Score(2.0, 1.0, 3.0))
    assert (found.value, found.low, found.high) == pytest.approx((math.e**2, math.e, math.e**3))


def test_bleu_of_equal_text_is_100_whatever_its_case() -> None:
    assert bleu([LONG.upper()], [[LONG]]).value == pytest.approx(100)


def test_bleu_with_several_references_and_differing_numbers_of_them() -> None:
    words = LONG.split()
    other = " ".join(reversed(words))
    both = bleu([LONG, LONG], [[other, LONG], [LONG]])
    assert both.value == pytest.approx(100)
    assert bleu([LONG, LONG], [[other], [LONG]]).value < 100


def test_bleu_by_hand() -> None:
    # 7 of 8 words, 5 of 7 pairs, 4 of 6 triples, 3 of 5 quadruples; as long as the reference, so no brevity penalty
    score = bleu(["a b c d e f X h"], [["a b c d e f g h"]])
    assert score.value == pytest.approx(100 * (7 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** 0.25, rel=1e-6)


def test_rouge_l_takes_the_best_reference() -> None:
    # longest common subsequence a b d: 3 of 4 predicted words, 3 of 3 reference words
    score = rouge_l(["a b c d"], [["x y", "a b d"]])
    assert score.value == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'exactmatch'.*did you mean 'exact_match'"):
        check_metrics(["loss", "exactmatch"])


@given(st.integers(2, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=25))
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_resamples_of_class_scores_are_what_scikit_learn_says(classes: int, items: list[tuple[int, int]]) -> None:
    y, t = (np.array([pair[i] % classes for pair in items]) for i in (0, 1))
    picks = np.random.default_rng(3).integers(0, len(y), (6, len(y)))
    counts, average = _Counts(y, t, classes), "binary" if classes == 2 else "macro"
    with np.errstate(all="ignore"):
        ours = [counts.f1(picks), counts.matthews(picks)]
    theirs = [f1_score(t[p], y[p], average=average, zero_division=0.0) for p in picks]
    assert ours[0] == pytest.approx(theirs) and ours[1] == pytest.approx([matthews_corrcoef(t[p], y[p]) for p in picks])
    assert f1(y, t, classes).value == pytest.approx(f1_score(t, y, average=average, zero_division=0.0))
    assert matthews(y, t, classes).value == pytest.approx(matthews_corrcoef(t, y))


def test_resamples_of_correlations_are_what_scipy_says() -> None:
    chance = np.random.default_rng(0)
    y, t = chance.normal(size=40), chance.normal(size=40).round(1)  # with ties
    for ours, theirs in ((pearson, pearsonr), (spearman, spearmanr)):
        draws = [theirs(y[p], t[p]).statistic for picks in drawn(40, 0, _RESAMPLES) for p in picks]
        found = ours(y, t)
        assert found.value == pytest.approx(theirs(y, t).statistic)
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))


def test_resamples_of_many_items_come_in_parts() -> None:
    sizes = []

    def of(picks: np.ndarray) -> np.ndarray:
        sizes.append(picks.shape)
        return picks.mean(1)

    resampled(0.0, of, 50_000)
    assert sum(count for count, _ in sizes) == 1000 and max(count for count, _ in sizes) == 20


def test_of_constant_predictions_there_is_no_correlation() -> None:
    assert math.isnan(pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).value)
    assert matthews([0, 0, 0], [0, 1, 1], 2) == Score(0.0, 0.0, 0.0)
