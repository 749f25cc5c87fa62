"""Ticks are round and few, labels are short and true, decimation keeps what matters."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltaw.runs.reports.axes import decimate, finite, linear_axis, log_axis, short, tick_labels

value = st.floats(-1e300, 1e300).map(lambda v: v if abs(v) > 1e-290 else 0.0)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.1, 3.4], ["0", "1", "2", "3", "4"]),
        ([0.0, 5e-4], ["0", "1e−4", "2e-4", "3e-4", "4e-4", "5e-4"]),
        ([0, 12_000], ["0k", "5k", "10k", "15k"]),
        ([2.21, 2.24], ["2.21", "2.22", "2.23", "2.24"]),
        ([-1.0, 1.0], ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        ([1.6e9, 3.1e9], ["1.5G", "2.0G", "2.5G", "3.0G", "3.5G"]),
    ],
)
def test_ticks_are_round(values: list[float], labels: list[str]) -> None:
    found = linear_axis(values, count=4 if len(labels) < 6 else 5).labels()
    zero = {"0k": "0", "0.0": "0"}
    assert found == [zero.get(w, w.replace("-", "−")) for w in labels]


@given(st.lists(value, min_size=1, max_size=9), st.booleans(), st.booleans())
def test_any_linear_axis_holds_its_values(values: list[float], zero: bool, snug: bool) -> None:
    axis = linear_axis(values, zero=zero, snug=snug)
    assert all(-1e-9 <= axis.place(v) <= 1 + 1e-9 for v in values)
    assert len(axis.ticks) <= 12
    assert len(set(axis.labels())) == len(axis.ticks) or max(map(abs, values)) > 1e6 * (max(values) - min(values))


@given(st.lists(st.floats(1e-290, 1e290), min_size=1, max_size=9))
def test_any_log_axis_holds_its_values(values: list[float]) -> None:
    axis = log_axis(values)
    assert all(-1e-9 <= axis.place(v) <= 1 + 1e-9 for v in values)
    assert 2 <= len(axis.ticks) <= 9


@given(st.lists(st.floats(), min_size=1, max_size=3000))
def test_decimation_keeps_ends_extremes_gaps_and_order(values: list[float]) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    kept = decimate(points, most=100)
    assert len(kept) <= 130 and [p[0] for p in kept] == sorted({p[0] for p in kept})
    drawn = [p for p in points if finite(p[1]) is not None]
    if drawn:
        left = [p for p in kept if finite(p[1]) is not None]
        assert (left[0], left[-1]) == (drawn[0], drawn[-1])
        assert max(p[1] for p in left) == max(p[1] for p in drawn)
        assert min(p[1] for p in left) == min(p[1] for p in drawn)
    assert any(finite(p[1]) is None for p in kept) == (len(drawn) < len(points))


def test_a_spike_among_ten_thousand_survives() -> None:
    points = [(i, 1.0) for i in range(10_000)]
    points[7_777], points[3_333] = (7_777, 50.0), (3_333, math.nan)
    kept = decimate(points)
    assert (7_777, 50.0) in kept and any(math.isnan(y) for _, y in kept) and len(kept) <= 1_500


@pytest.mark.parametrize(
    ("number", "label"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (1234, "1234"),
        (12_345, "12.35k"),
        (-2e-4, "−2e−4"),
        (3.14159, "3.142"),
        (2.5e18, "2.5e18"),
    ],
)
def test_short_numbers(number: float, label: str) -> None:
    assert short(number) == label.replace("e-", "e−")


def test_labels_of_no_ticks() -> None:
    assert tick_labels([]) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "x", 10**400, 1e308])
def test_what_cannot_be_drawn_is_a_gap(bad: object) -> None:
    assert finite(bad) is None


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9))
@example([5e-324])
def test_an_axis_of_shares_ends_at_what_can_be(values: list[float]) -> None:
    axis = linear_axis(values, count=4, most=1.0)
    assert axis.low >= 0 and axis.high <= 1 + 1e-9
    assert all(0 <= t <= 1 + 1e-9 for t in axis.ticks) and all(-1e-9 <= axis.place(v) <= 1 + 1e-9 for v in values)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=9))
def test_an_axis_of_counts_has_whole_numbers_from_zero_on(values: list[int]) -> None:
    axis = linear_axis([float(v) for v in values], zero=True, whole=True)
    assert axis.low == 0 and all(t == int(t) for t in axis.ticks)


def test_equal_values_at_a_bound_are_drawn_within_it() -> None:
    assert (linear_axis([1.0, 1.0], most=1.0).high, linear_axis([0.0], most=1.0).low) == (1.0, 0.0)
    assert linear_axis([1.0, 1.0]).high > 1 and linear_axis([-1.0, 2.0]).low < 0
