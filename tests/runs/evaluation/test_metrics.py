"""Scores against values worked out by hand; intervals that mean something."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from deltaw.errors import ConfigError
from deltaw.runs.evaluation.bootstrap import ItemScore, percentiles, resampled_weights
from deltaw.runs.evaluation.metrics import (
    accuracy,
    bleu,
    check_metrics,
    exact_match,
    f1,
    matthews,
    pearson,
    perplexity,
    ratio,
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


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 40)), min_size=2, max_size=30))
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
    found = perplexity(ItemScore(2.0, 1.0, 3.0, np.array([2.0, 5.0, -1.0])))
    assert (found.value, found.low, found.high) == pytest.approx((math.e**2, math.e, math.e**3))
    # Without each of three items the losses are 2, 0.5 and 3.5
    assert found.parts == pytest.approx([3 * math.e**2 - 2 * math.exp(v) for v in (2.0, 0.5, 3.5)])


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


def against(score: Any, of: Any, items: np.ndarray) -> None:
    """A score's interval and parts, against `of` taken anew on the records of each resample."""
    count = items.max() + 1
    members = [np.flatnonzero(items == i) for i in range(count)]
    draws = []
    for weights in resampled_weights(count):
        for row in weights[:: max(1, len(weights) // 60)]:
            draws.append(of(np.concatenate([members[i] for i, times in enumerate(row) for _ in range(int(times))])))
    few = percentiles(score.value, np.array(draws), count)
    assert (score.low, score.high) == pytest.approx((few.low, few.high), abs=0.25 * (few.high - few.low) + 1e-9)
    without = np.array([of(np.flatnonzero(items != i)) for i in range(count)])
    assert score.parts == pytest.approx(count * score.value - (count - 1) * without)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.filterwarnings("ignore")
def test_scores_of_classes_resample_items(classes: int) -> None:
    chance = np.random.default_rng(classes)
    y, t = chance.integers(0, classes, (2, 50))
    items = np.arange(50) % 13
    average = "binary" if classes == 2 else "macro"
    ours = [each(y, t, classes, items) for each in (f1, matthews, accuracy)]
    theirs = (
        lambda p: f1_score(t[p], y[p], average=average, zero_division=0.0),
        lambda p: matthews_corrcoef(t[p], y[p]),
        lambda p: (t[p] == y[p]).mean(),
    )
    for score, of in zip(ours, theirs, strict=True):
        assert score.value == pytest.approx(of(np.arange(50)))
        against(score, of, items)


@given(st.integers(2, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=12))
@settings(max_examples=8, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_scores_of_few_classes_are_what_scikit_learn_says(classes: int, pairs: list[tuple[int, int]]) -> None:
    y, t = (np.array([pair[i] % classes for pair in pairs]) for i in (0, 1))
    average, n = "binary" if classes == 2 else "macro", len(pairs)
    for ours, theirs in (
        (f1, lambda p: f1_score(t[p], y[p], average=average, zero_division=0.0)),
        (matthews, lambda p: matthews_corrcoef(t[p], y[p])),
    ):
        score = ours(y, t, classes)
        without = np.array([theirs(np.delete(np.arange(n), i)) for i in range(n)])
        assert score.value == pytest.approx(theirs(np.arange(n)))
        assert score.parts == pytest.approx(n * score.value - (n - 1) * without)


def test_correlations_resample_items_and_rank_each_resample_anew() -> None:
    chance = np.random.default_rng(0)
    y, t = chance.normal(size=40), chance.normal(size=40).round(1)  # with ties
    items = np.arange(40) % 11
    for ours, theirs in ((pearson, pearsonr), (spearman, spearmanr)):
        against(ours(y, t, items), lambda p, of=theirs: of(y[p], t[p]).statistic, items)
        assert ours(y, t, items).value == pytest.approx(theirs(y, t).statistic)


def test_bleu_resamples_items_as_sacrebleu_would_score_them() -> None:
    chance = np.random.default_rng(1)
    words = np.array(["the", "a", "cheap", "pub", "near", "river", "is", "of"])
    said = [" ".join(chance.choice(words, chance.integers(5, 12))) for _ in range(18)]
    wanted = [
        [" ".join(np.where(chance.random(len(s.split())) < 0.8, s.split(), "x")) for _ in range(1 + i % 3)]
        for i, s in enumerate(said)
    ]
    items = np.arange(18) % 9

    def of(places: np.ndarray) -> float:
        from sacrebleu.metrics.bleu import BLEU

        columns = [[wanted[i][n] if n < len(wanted[i]) else None for i in places] for n in range(3)]
        metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none")
        return float(metric.corpus_score([said[i] for i in places], columns).score)

    score = bleu(said, wanted, items.tolist())
    assert score.value == pytest.approx(of(np.arange(18))) and score.low < score.value < score.high
    against(score, of, items)


def test_bleu_without_a_single_match_of_four_words_is_0() -> None:
    score = bleu(["a b c", "d e f"], [["a b c"], ["d e f"]])
    assert (score.value, score.low, score.high) == (0.0, 0.0, 0.0)


def test_copies_of_an_item_do_not_narrow_an_interval() -> None:
    hits, items = [0.0, 1.0, 1.0, 0.0, 1.0], list(range(5))
    once, copied = ratio(hits, [1.0] * 5), ratio(hits * 20, [1.0] * 100, items * 20)
    assert copied == once and ratio(hits * 20, [1.0] * 100).high < once.high
    for score in (
        exact_match(["a", "b"] * 4, [["a"]] * 8, [0, 1] * 4),
        rouge_l(["a", "b"] * 4, [["a"]] * 8, [0, 1] * 4),
    ):
        assert len(score.parts) == 2 and (score.low, score.high) == (0.0, 1.0)


def test_of_constant_predictions_there_is_no_correlation() -> None:
    assert math.isnan(pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).value)
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).low)
    assert matthews([0, 0, 0], [0, 1, 1], 2).plain() == {"value": 0.0, "low": 0.0, "high": 0.0}
