"""Which rank is enough, on losses whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.study.choice import Losses, chosen

RANKS = (1, 2, 4, 8, 16)


def made(
    excess: dict[int, float], *, seeds: int = 1, noise: float = 0.02, n: int = 400, seed: int = 0
) -> dict[int, Losses]:
    """Losses around 1 that share what is hard about a record; each rank's are worse by its `excess`."""
    chance = np.random.default_rng(seed)
    counts = chance.integers(1, 30, n).astype(float)
    hard = chance.gamma(4.0, 0.25, n)
    return {
        rank: Losses((hard + more + noise * chance.standard_normal((seeds, n))) * counts, counts)
        for rank, more in excess.items()
    }


@pytest.mark.parametrize("enough", RANKS)
def test_the_smallest_rank_that_loses_nothing(enough: int) -> None:
    found = chosen(made({r: 0.0 if r >= enough else 0.1 for r in RANKS}), 0.01)
    assert found.rank == enough
    assert [t.rank for t in found.tested] == list(RANKS)
    assert all(t.loss.low < t.loss.value < t.loss.high for t in found.tested)
    assert found.tested[-1].difference.value == 0.0


def test_pairs_show_what_single_intervals_cannot() -> None:
    found = chosen(made({1: 0.03, 16: 0.0}), 0.01)
    one, largest = found.tested
    assert one.loss.low < largest.loss.high  # by themselves they overlap
    assert one.difference.low > 0 and found.rank == 16


def test_a_rank_is_not_taken_beyond_one_that_fails() -> None:
    assert chosen(made({1: 0.0, 2: 0.1, 4: 0.0, 8: 0.0, 16: 0.0}), 0.01).rank == 4


def test_what_more_rank_makes_worse_leaves_the_smallest() -> None:
    assert chosen(made({r: 0.002 * r for r in RANKS}), 0.01).rank == 1


def test_few_noisy_records_prove_nothing() -> None:
    assert chosen(made({1: 0.0, 16: 0.0}, noise=3.0, n=20), 0.01).rank == 16


def test_the_seeds_spread_widens_the_interval() -> None:
    one = made({1: 0.0, 16: 0.0}, seeds=3)
    shifted = {
        r: Losses(own.sums + np.array([[-0.1], [0.0], [0.1]]) * own.counts, own.counts) for r, own in one.items()
    }
    narrow, wide = (chosen(each, 0.01).tested[0].difference for each in (one, shifted))
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert shifted[1].seeds[0] < shifted[1].value < shifted[1].seeds[2]


@given(st.floats(0.0, 0.2), st.floats(0.001, 0.2))
@settings(max_examples=20, deadline=None)
def test_a_wider_margin_never_asks_for_more_rank(more: float, margin: float) -> None:
    losses = made({1: more, 2: more / 2, 4: 0.0}, n=60)
    assert chosen(losses, 2 * margin).rank <= chosen(losses, margin).rank


def test_a_rank_that_was_passed_over_is_named() -> None:
    from deltaw.study.sweep_report import passed_over

    tested = [{"rank": r, "enough": e} for r, e in ((1, False), (8, True), (16, False), (64, True))]
    (said,) = passed_over(tested, 64)
    assert "r = 8 " in said and "r = 16 " in said
    assert not passed_over([*tested[:2], {"rank": 16, "enough": True}], 8)
