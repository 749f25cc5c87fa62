"""What a sweep says of its results."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.runs.evaluation.bootstrap import ERROR_RATE, Choice, Score, Tested, chosen
from deltaw.runs.reports.sweep import why_no_smaller
from tests.runs.evaluation.test_choice import made


def test_what_ended_the_tests_is_said() -> None:
    def tested(rank: int, low: float, high: float, enough: bool) -> Tested:
        return Tested(rank, Score(2.0, 1.0, 3.0), Score((low + high) / 2, low, high), enough)

    worse, unclear, largest = tested(1, 0.1, 0.2, False), tested(16, -0.02, 0.03, False), tested(64, 0.0, 0.0, True)
    assert why_no_smaller(Choice(64, 0.01, [largest])) == []
    (reason,) = why_no_smaller(Choice(8, 0.01, [worse, tested(8, -0.1, 0.0, True), largest]))
    assert reason == "r = 1 is worse: its loss less the largest rank's is 0.1500 [0.1000, 0.2000]"
    first, second, third = why_no_smaller(Choice(64, 0.01, [worse, tested(8, -0.1, 0.0, True), unclear, largest]))
    assert first.startswith("r = 16 is not shown to be enough, nor to be worse: ") and "the margin 0.0100" in first
    assert second == "r = 8 would be enough with a margin of 1.5% of the loss"
    assert third == "r = 8 would be enough by itself"


def test_a_margin_of_all_records_is_not_offered() -> None:
    """It would allow any rank."""
    worse, largest = (
        Tested(rank, Score(0.2, 0.0, 1.0), Score(0.1, -0.2, high), rank == 8) for rank, high in ((1, 1.0), (8, 0.0))
    )
    (reason,) = why_no_smaller(Choice(8, 0.01, [worse, largest], by=ERROR_RATE))
    assert reason.startswith("r = 1 is not shown to be enough, nor to be worse: ")


@given(st.lists(st.floats(-0.05, 0.1), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_the_margin_that_is_said_would_give_that_rank(worse: list[float]) -> None:
    losses = made({1: worse[0], 2: worse[1], 4: worse[2], 8: 0.0}, n=40)
    choice = chosen(losses, 0.01)
    for sentence in why_no_smaller(choice):
        if match := re.fullmatch(r"r = (\d+) would be enough with a margin of (.*)% of the loss", sentence):
            assert chosen(losses, float(match[2]) / 100).rank <= int(match[1]) < choice.rank
