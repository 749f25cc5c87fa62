"""Candidates beside the best one, on losses whose answer is known."""

from __future__ import annotations

import numpy as np

from deltaw.study.compared import compared
from deltaw.study.resampling import Losses


def made(excess: dict[str, float], *, seed: int = 0, n: int = 300, noise: float = 0.05) -> dict[str, Losses]:
    """Losses around 1 that share what is hard about a record; each candidate's are worse by its `excess`."""
    chance = np.random.default_rng(seed)
    counts = chance.integers(1, 30, n).astype(float)
    hard = chance.gamma(4.0, 0.25, n)
    return {
        name: Losses((hard + more + noise * chance.standard_normal((1, n))) * counts, counts)
        for name, more in excess.items()
    }


def test_the_worse_ones_are_named_though_single_intervals_overlap() -> None:
    best, near, worst = compared(made({"far": 0.05, "best": 0.0, "near": 0.001}))
    assert {best.name, near.name} == {"best", "near"} and worst.name == "far"
    assert worst.loss.low < best.loss.high
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
