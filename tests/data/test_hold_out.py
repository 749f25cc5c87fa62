"""Sets that are cut by whole items."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.config import DataConfig
from deltaw.data import read
from deltaw.data.hold_out import first, hold_out, sample
from deltaw.errors import DataError

SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=9)


def records_of(sizes: list[int]) -> Any:
    """Items of these sizes, their records in turn."""
    rows = [
        {"prompt": f"p{i}", "completion": str(n)} for n in range(max(sizes)) for i, size in enumerate(sizes) if n < size
    ]
    return read(rows, DataConfig()).items


def cut(records: Any, count: int, *, seed: int = 0, most: int = 10**6) -> list[int]:
    return hold_out(records, count, most=most, seed=seed, source="data", instead="Do this.")


def whole(records: Any, picked: list[int]) -> bool:
    """Whether no prompt is on both sides."""
    inside, there = Counter(records[i].prompt for i in picked), Counter(r.prompt for r in records)
    return len(set(picked)) == len(picked) and all(there[prompt] == count for prompt, count in inside.items())


@given(SIZES, st.integers(1, 30), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_as_near_to_what_was_asked_as_whole_items_allow(sizes: list[int], count: int, seed: int) -> None:
    records = records_of(sizes)
    picked = cut(records, count, seed=seed)
    assert whole(records, picked) and picked == cut(records, count, seed=seed)
    sums = {sum(part) for n in range(1, len(sizes)) for part in combinations(sizes, n)}
    assert abs(len(picked) - count) == min(abs(s - count) for s in sums)


@given(SIZES, st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_never_over_the_most_but_for_the_smallest_item(sizes: list[int], most: int) -> None:
    records = records_of(sizes)
    for picked in (cut(records, most, most=most), sample(records, most, seed=1)):
        assert whole(records, picked)
        assert len(picked) <= most or len(picked) == min(sizes)
    fitting = {sum(part) for n in range(1, len(sizes) + 1) for part in combinations(sizes, n) if sum(part) <= most}
    assert len(picked) == max(fitting, default=min(sizes))


def test_other_seeds_hold_out_others_and_each_item_alike() -> None:
    records = records_of([3, 1, 2, 2, 1, 3, 2, 1])
    counts = Counter(records[i].prompt for seed in range(200) for i in cut(records, 4, seed=seed))
    assert len(counts) == 8 and len({tuple(cut(records, 4, seed=seed)) for seed in range(50)}) > 20


def test_many_records_are_held_out_quickly_and_exactly() -> None:
    records = records_of([1 + i % 7 for i in range(2000)])
    picked = cut(records, 3001)
    assert len(picked) == 3001 and whole(records, picked)


def test_prompts_that_are_all_different_are_drawn_one_by_one() -> None:
    assert len(cut(records_of([1] * 50), 7)) == 7


def test_one_prompt_alone_cannot_be_held_out() -> None:
    with pytest.raises(DataError, match=r"data: its 300 records are of 1 prompt, so none can be held out .* Do this\."):
        cut(records_of([300]), 6)


def test_the_first_items_are_whole() -> None:
    records = records_of([2, 3, 1])  # in turn: 0 1 2 0 1 1
    assert first(records, 4) == [0, 3] and first(records, 5) == [0, 1, 3, 4, 5] and first(records, 1) == [0, 3]
    assert first(records, 99) == list(range(6))
