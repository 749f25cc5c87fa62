"""The largest batch within an amount of memory."""

from __future__ import annotations

import pytest

from deltaw.runs.memory.parts import largest


@pytest.mark.parametrize("most", [0, 1, 2, 37, 1000])
def test_the_largest_that_fits(most: int) -> None:
    asked: list[int] = []

    def needed(rows: int) -> int:
        asked.append(rows)
        return 1000 + 7 * rows + rows % 3

    assert largest(needed, 1000 + 7 * most + 2) == most
    assert len(asked) < 24
