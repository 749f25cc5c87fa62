"""Which rank is enough, on losses whose answer is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.runs.evaluation.bootstrap import ERROR_RATE, Measured, chosen, errors_of, figure, of_losses

RANKS = (1, 2, 4, 8, 16)


def made(
    excess: dict[int, float], *, seeds: int = 1, noise: float = 0.02, n: int = 400, seed: int = 0
) -> dict[int, Measured]:
    """Losses around 1 that share what is hard about a record; each rank's are worse by its `excess`."""
    chance = np.random.default_rng(seed)
    counts = chance.integers(1, 30, n).astype(float)
    hard = chance.gamma(4.0, 0.25, n)
    return {
        rank: of_losses((hard + more + noise * chance.standard_normal((seeds, n))) * counts, counts)
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


def test_a_single_item_proves_nothing() -> None:
    found = chosen(
        {rank: of_losses(np.array([[loss]]), np.ones(1)) for rank, loss in ((1, 1.0), (2, 1.0), (4, 1.0))}, 0.01
    )
    assert found.rank == 4 and not any(t.enough for t in found.tested)


def test_a_choice_cannot_be_changed() -> None:
    found = chosen(made({1: 0.0, 2: 0.0}), 0.01)
    for part in (found, *found.tested):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.rank = 8  # type: ignore[misc]


SPREAD = np.array([[-0.1], [0.0], [0.1]])


def spread(own: Measured) -> Measured:
    """The three runs are further apart."""
    return Measured(own.values + SPREAD[:, 0], own.parts + SPREAD, own.seeds)


def width(found: Any) -> float:
    return float(found.high - found.low)


def test_what_a_seed_does_to_one_rank_alone_widens_the_interval() -> None:
    one = made({1: 0.0, 16: 0.0}, seeds=3)
    narrow, wide = (chosen(each, 0.01).tested[0].difference for each in (one, one | {1: spread(one[1])}))
    assert width(wide) > 5 * width(narrow)


def test_what_a_seed_does_to_all_ranks_alike_says_nothing_of_their_difference() -> None:
    one = made({1: 0.0, 16: 0.0}, seeds=3)
    before, after = (chosen(each, 0.01).tested[0] for each in (one, {r: spread(own) for r, own in one.items()}))
    assert width(after.loss) > width(before.loss)
    assert after.difference.high == pytest.approx(before.difference.high)


def test_a_run_that_failed_leaves_the_others() -> None:
    losses = made({1: 0.0, 16: 0.0}, seeds=3)
    kept = losses[1]
    found = chosen(losses | {1: Measured(kept.values[[0, 2]], kept.parts[[0, 2]], (0, 2))}, 0.01)
    assert found.tested[0].loss.value == pytest.approx(kept.values[[0, 2]].mean())
    both = kept.values[[0, 2]] - losses[16].values[[0, 2]]
    assert found.tested[0].difference.value == pytest.approx(both.mean())


def test_the_margin_is_a_share_of_the_largest_ranks_loss_and_its_edge_is_enough() -> None:
    """Losses that no item tells apart: their differences are exact."""
    counts = np.ones(4)
    losses = {rank: of_losses(np.full((1, 4), loss), counts) for rank, loss in ((1, 2.5), (2, 2.25), (4, 2.0))}
    found = chosen(losses, 0.125)
    assert found.margin == 0.25 and found.rank == 2
    assert [t.enough for t in found.tested] == [False, True, True]
    assert [t.difference.value for t in found.tested] == [0.5, 0.25, 0.0]


def test_few_records_of_a_prompt_are_not_many_items() -> None:
    """Fifty copies of each of eight items say what the eight say."""
    chance = np.random.default_rng(0)
    once, counts = chance.standard_normal((1, 8)), np.ones(8)
    items = np.tile(np.arange(8), 50)
    copied = of_losses(np.tile(once, 50), np.ones(400), items)
    alone = of_losses(once, counts)
    assert dataclasses.astuple(copied.interval()) == pytest.approx(dataclasses.astuple(alone.interval()))
    assert width(of_losses(np.tile(once, 50), np.ones(400)).interval()) < 0.2 * width(alone.interval())


@given(st.floats(0.0, 0.2), st.floats(0.001, 0.2))
@settings(max_examples=20, deadline=None)
def test_a_wider_margin_never_asks_for_more_rank(more: float, margin: float) -> None:
    losses = made({1: more, 2: more / 2, 4: 0.0}, n=60)
    assert chosen(losses, 2 * margin).rank <= chosen(losses, margin).rank


def test_a_loss_near_zero_gives_up_a_little() -> None:
    """A share of it is so little that no smaller rank would be enough."""
    near = made({1: 0.003, 4: 0.001, 16: 0.0}, noise=0.0001)
    assert chosen(near, 1e-6).rank == 16
    assert chosen(near, 1e-6, least=0.005).rank == 1 and chosen(near, 1e-6, least=0.005).margin == 0.005
    assert chosen(near, 1e-6, least=0.002).rank == 4
    assert chosen(near, 0.0, least=0.005).rank == 16


def rates(**wrong: int) -> dict[int, Measured]:
    """Error rates on 200 records, of which rank r answers the first wrong[r] wrong."""
    items = np.arange(200)
    return {
        int(rank[1:]): errors_of(of_losses((items >= count).astype(float)[None], np.ones(200), items))
        for rank, count in wrong.items()
    }


def test_classes_are_chosen_by_the_records_that_are_answered_wrong() -> None:
    # A solved task: every rank is right, whatever the losses say
    solved = chosen(rates(r1=0, r8=0, r64=0), 0.01, by=ERROR_RATE)
    assert (solved.rank, solved.margin, solved.by) == (1, 0.01, ERROR_RATE)
    # 20 of 200 more are wrong at r = 1: that is worse than a margin of one in a hundred
    found = chosen(rates(r1=30, r8=10, r64=10), 0.01, by=ERROR_RATE)
    assert found.rank == 8 and found.tested[0].difference.value == pytest.approx(0.1)
    assert all(0 <= test.loss.low <= test.loss.high <= 1 for test in found.tested)
    assert chosen(rates(r1=30, r8=10, r64=10), 0.2, by=ERROR_RATE).rank == 1


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.4126, 3, "0.413"), (0.00041, 3, "0.00041"), (0.0, 3, "0.000"), (-0.00002, 4, "-0.000020"), (1.5, 4, "1.5000")],
)
def test_small_figures_keep_two_significant_digits(value: float, digits: int, text: str) -> None:
    assert figure(value, digits) == text
