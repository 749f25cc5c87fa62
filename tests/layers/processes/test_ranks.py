"""A process's share of a step, and what one process alone need not ask others."""

from __future__ import annotations

import pytest
import torch

from deltaw.errors import ConfigError
from deltaw.layers.processes.ranks import ALONE, Ranks, joined


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", range(12))
def test_the_rows_are_dealt_out_whole_evenly_and_in_order(rows: int, count: int) -> None:
    parts = [Ranks(rank, count).part(range(rows)) for rank in range(count)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts[0]) > 0 or rows == 0


def test_one_process_keeps_its_values_and_errors() -> None:
    tensor = torch.ones(2)
    assert ALONE.add_up(tensor) is tensor and ALONE.total(1.5, 2) == [1.5, 2] and ALONE.any(True)
    assert ALONE.of_first(3.0) == 3.0 and ALONE.from_first("a") == "a" and ALONE.by_first(lambda: 1) == 1
    assert ALONE.together(lambda: 2) == 2

    def fails() -> None:
        raise ConfigError("no")

    for way in (ALONE.by_first, ALONE.together):
        with pytest.raises(ConfigError, match="no"):
            way(fails)
    ALONE.check_same({"a": 1})
    with joined() as ranks:
        assert ranks is ALONE and ranks.is_first
