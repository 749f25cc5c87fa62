"""A map shows its values by their own scale, which it says."""

from __future__ import annotations

import re

import pytest

from deltaw.runs.reports.heatmap import HeatMap, render_map, strongest


def shades(values: list[list[float]]) -> list[float]:
    """The opacity of each square that says its value."""
    page = render_map(HeatMap("t", "x", "y", values))
    return [float(opacity) for opacity in re.findall(r'fill-opacity="([\d.]+)"><title>', page)]


@pytest.mark.parametrize("largest", [0.9, 0.04, 0.0003, 1e-9])
def test_a_map_of_small_values_is_not_blank(largest: float) -> None:
    values = [[0.0, largest / 4], [largest / 2, largest]]
    seen = shades(values)
    assert max(seen) >= 0.5 and min(seen) < 0.2 and len(set(seen)) == 4
    assert f"{strongest(values):g}</p>" in render_map(HeatMap("t", "x", "y", values))


def test_large_values_keep_the_scale_to_one() -> None:
    assert strongest([[0.2, 0.7]]) == 1.0 and strongest([[0.0]]) == 1.0 and strongest([[float("nan"), 0.011]]) == 0.02
    assert shades([[0.0, 0.0]]) == [0.0]


def test_small_values_are_said_in_two_digits() -> None:
    assert "1, 1: 0.0034" in render_map(HeatMap("t", "x", "y", [[0.0034, 0.5]]))
