"""Scores against values worked out by hand; intervals that mean something."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.errors import ConfigError
from deltaw.study.metrics import Score, bleu, check_metrics, exact_match, perplexity, ratio, rouge_l

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
