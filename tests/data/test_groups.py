"""Records that begin alike: their groups, and an order in which they meet that favours no record."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data import batches, plan
from deltaw.data.batches import Order
from deltaw.data.groups import Alike, groups_of, packs_of

SYSTEM = list(range(100, 140))
DOCUMENTS = [[1000 * d + i for i in range(50)] for d in range(1, 5)]
QUESTIONS = [[7, 7, q] for q in range(6)]


def test_records_of_one_document_are_a_group() -> None:
    rows = [SYSTEM + document + question for question in QUESTIONS for document in DOCUMENTS]
    groups = groups_of(rows)
    assert sorted(sorted(group) for group in groups) == [[d + 4 * q for q in range(6)] for d in range(4)]


def test_what_all_records_begin_with_makes_no_group() -> None:
    rows = [SYSTEM + [n] * 20 for n in range(5)]
    assert [*map(len, groups_of(rows))] == [1] * 5


def test_the_turns_of_a_conversation_are_a_group_in_their_order() -> None:
    turns = [[9] * 30 + list(range(30 * n)) for n in range(1, 5)]
    other = [[8] * 40 + list(range(50, 50 + 40 * n)) for n in range(1, 4)]
    assert groups_of([*turns, *other]) == [[4, 5, 6], [0, 1, 2, 3]]


def test_tokens_are_ordered_as_numbers() -> None:
    """A byte of a token says nothing without the ones before it."""
    rows = [[256] * 30, [255] * 30, [65536 + 1] * 30, [256] * 31]
    assert groups_of(rows) == [[1], [0, 3], [2]]


@given(st.lists(st.lists(st.integers(0, 2), max_size=40), max_size=12))
def test_each_record_is_in_one_group(rows: list[list[int]]) -> None:
    assert sorted(i for group in groups_of(rows) for i in group) == list(range(len(rows)))


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 5), st.integers(0, 9))
def test_packs_hold_each_record_once_and_are_of_nearly_one_size(sizes: list[int], most: int, seed: int) -> None:
    numbers = iter(range(100))
    groups = [[next(numbers) for _ in range(size)] for size in sizes]
    packs = packs_of(groups, most, random.Random(seed))
    assert sorted(i for pack in packs for i in pack) == [i for group in groups for i in group]
    for group in groups:
        of_group = [len(pack) for pack in packs if pack[0] in group]
        assert len(of_group) == -(-len(group) // most) and max(of_group) <= most and max(of_group) - min(of_group) <= 1


LENGTHS = [10 + i % 7 * 8 for i in range(240)]
GROUPS = [list(range(i, i + n)) for i, n in ((0, 90), (90, 40), (130, 3), (133, 7))] + [[i] for i in range(140, 240)]


@pytest.mark.parametrize("tokens", [None, 400])
def test_groups_meet_and_every_record_comes_once(tokens: int | None) -> None:
    group_of = {i: number for number, group in enumerate(GROUPS) for i in group}
    orders = [Order(LENGTHS, batch=8, seed=1, tokens=tokens, groups=groups) for groups in (None, GROUPS)]
    steps = orders[0].steps(1)
    met = []
    for order in orders:
        epoch = [order.at(step) for step in range(order.steps(1))]
        assert sorted(i for batch in epoch for i in batch) == list(range(240))
        met.append(sum(len({group_of[i] for i in batch}) for batch in epoch) / len(epoch))
        if tokens is not None:
            assert all(len(b) * (-(-max(LENGTHS[i] for i in b) // 8) * 8) <= tokens for b in epoch)
    assert met[1] < 0.85 * met[0] and steps > 20
    if tokens is None:
        assert orders[1].steps(1) == steps == 30


def test_a_step_sees_two_packs_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    one = [list(range(64))]
    for seed in range(5):
        packs: list[list[int]] = []

        def packed(
            groups: list[list[int]], most: int, chance: random.Random, packs: list[list[int]] = packs
        ) -> list[list[int]]:
            packs.extend(packs_of(groups, most, chance))
            return list(packs)

        monkeypatch.setattr(batches, "packs_of", packed)
        plan([9] * 64, 8, seed, 0, None, one)
        assert {len(pack) for pack in packs} == {4}


def test_no_record_is_likelier_early_or_late() -> None:
    """Over many seeds, the mean step of the records of a large group, of a small one and of none is the middle of the epoch."""
    places: dict[str, list[float]] = {"large": [], "small": [], "alone": []}
    for seed in range(400):
        order = Order(LENGTHS, batch=8, seed=seed, groups=GROUPS)
        for step in range(30):
            for i in order.at(step):
                places["large" if i < 130 else "small" if i < 140 else "alone"].append(step / 29)
    for steps in places.values():
        assert abs(sum(steps) / len(steps) - 0.5) < 0.02


def test_the_order_is_another_in_each_epoch_and_for_each_seed() -> None:
    orders = {(seed, start): [tuple(Order(LENGTHS, batch=8, seed=seed, groups=GROUPS).at(start + i)) for i in range(30)] for seed in (0, 1) for start in (0, 30)}  # fmt: skip
    assert len({tuple(order) for order in orders.values()}) == 4


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ((50, 7.9, 8, 1.0, 1.0, False), None),
        ((50, 1, 1, 1.0, 1.0, True), None),
        ((50, 7.9, 8, 0.6, 0.55, False), "Records begin alike: 60% of a step's tokens are to be computed."),
        ((50, 7.9, 8, 1.0, 0.5, False), "Records fall into 50 groups that begin alike: with --share group a step has 50% of its tokens to compute."),
        ((50, 3.1, 8, 0.5, 0.5, True), "Records fall into 50 groups that begin alike; a step of 8 records has 3.1 of them, and 50% of their tokens to compute."),
    ],
)  # fmt: skip
def test_it_says_what_is_worth_it(figures: tuple[int, float, float, float, float, bool], said: str | None) -> None:
    assert Alike(*figures).text == said
