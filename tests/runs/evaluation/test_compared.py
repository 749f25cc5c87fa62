"""Candidates beside the best one, on losses whose answer is known."""

from __future__ import annotations

import numpy as np

from deltaw.runs.evaluation.bootstrap import Measured, compared, of_losses, together


def made(excess: dict[str, float], *, seed: int = 0, n: int = 300, noise: float = 0.05) -> dict[str, Measured]:
    """Losses around 1 that share what is hard about a record; each candidate's are worse by its `excess`."""
    chance = np.random.default_rng(seed)
    counts = chance.integers(1, 30, n).astype(float)
    hard = chance.gamma(4.0, 0.25, n)
    return {
        name: of_losses((hard + more + noise * chance.standard_normal((1, n))) * counts, counts)
        for name, more in excess.items()
    }


def test_the_worse_ones_are_named_though_single_intervals_overlap() -> None:
    best, near, worst = compared(made({"far": 0.05, "best": 0.0, "near": 0.001}))
    assert {best.name, near.name} == {"best", "near"} and worst.name == "far"
    assert worst.score.low < best.score.high
    assert worst.worse and not near.worse and not best.worse
    assert (best.difference.low, best.difference.value, best.difference.high) == (0.0, 0.0, 0.0)
    assert near.difference.low < 0 < near.difference.value < near.difference.high


def test_of_equals_one_is_seldom_called_worse() -> None:
    """Of eight equal candidates the best is best by luck, and the worst worst: single 95% intervals of the 28 differences would
    call one worse in most of such studies."""
    wrong = [any(c.worse for c in compared(made(dict.fromkeys("abcdefgh", 0.0), seed=i, n=120))) for i in range(40)]
    assert sum(wrong) <= 6  # 5% of 40 is 2; of as many as 7 or more the chance is below 1%


def test_the_same_losses_twice_differ_by_nothing() -> None:
    (own,) = made({"a": 0.0}).values()
    assert [c.difference.high for c in compared({"a": own, "b": own})] == [0.0, 0.0]


def test_the_intervals_are_those_of_all_pairs_together() -> None:
    """Also of the pairs without the best one, which make them wider; 90% would be a sixth narrower."""
    losses = made({"a": 0.0, "b": 0.01, "c": 0.02, "d": 0.03})
    names = [each.name for each in compared(losses)]
    pairs = [losses[b].less(losses[a]) for i, a in enumerate(names) for b in names[i + 1 :]]
    at_once, of_best = together(pairs), together(pairs[:3])
    for each, wide, narrow in zip(compared(losses)[1:], at_once, of_best, strict=False):
        assert each.difference == wide and wide.high > narrow.high
        alone = losses[each.name].less(losses[names[0]]).interval()
        assert 1.2 < (wide.high - wide.low) / (alone.high - alone.low) < 1.45  # 2.57 / 1.96 for four independent ones


def test_where_more_is_better_the_most_is_best_and_less_is_worse() -> None:
    scores = made({"far": 0.05, "most": 0.2, "near": 0.195})
    best, near, far = compared(scores, more_is_better=True)
    assert (best.name, near.name, far.name) == ("most", "near", "far")
    assert far.worse and far.difference.high < 0 and not near.worse and near.difference.value < 0
    assert near.difference.high > 0


def test_of_equal_scores_the_first_given_is_best() -> None:
    (own,) = made({"a": 0.0}).values()
    assert [c.name for c in compared({"z": own, "a": own}, more_is_better=True)] == ["z", "a"]
    assert [c.name for c in compared({"alone": own})] == ["alone"]


def test_records_of_one_prompt_are_one_item() -> None:
    """A candidate that is worse on one prompt of three, however many its records, is not shown to be worse."""
    counts, items = np.ones(90), np.repeat([0, 1, 2], 30)
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 90))
    first, second = 1 + noise[0], 1 + noise[1] + np.where(items == 0, 0.5, 0.0)
    by_records = compared({"a": of_losses(first, counts), "b": of_losses(second, counts)})
    by_items = compared({"a": of_losses(first, counts, items), "b": of_losses(second, counts, items)})
    assert by_records[1].worse and not by_items[1].worse


def test_a_candidate_may_be_better_than_the_one_that_all_are_compared_with() -> None:
    measured = made({"far": 0.05, "best": 0.0, "near": 0.001})
    first, *others = compared(measured, beside="near")
    assert first.name == "near" and [other.name for other in others] == ["best", "far"]
    best, far = others
    assert far.worse and not far.better and not best.worse and not best.better
    by_far = {row.name: row for row in compared(measured, beside="far")}
    assert by_far["best"].better and by_far["best"].difference.high < 0
    worst = {row.name: row for row in compared(measured)}["far"].difference
    assert abs(by_far["best"].difference.low + worst.high) < 1e-12  # the same pair, seen from the other side
