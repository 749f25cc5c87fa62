"""A table of shares as squares of one color, stronger for larger shares, in inline SVG. Knows numbers, not their meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.runs.reports.markup import tag, text

_SHADES = 16
_TICKS = 5


@dataclass(frozen=True)
class HeatMap:
    """Values from 0 to 1 by row and column, both counted from 1."""

    title: str
    x_label: str
    y_label: str
    values: Sequence[Sequence[float]]
    note: str = ""


def render_map(shown: HeatMap) -> str:
    """Return the map as a `<figure>` with title, squares, scale and note."""
    height, width, top = len(shown.values), len(shown.values[0]), strongest(shown.values)
    squares = "".join(_row(i, row, top) for i, row in enumerate(shown.values))
    inner = (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" width="100%" height="100%" '
        f'shape-rendering="crispEdges">{squares}</svg>'
    )
    picture = tag(
        "svg", _numbers(width, height) + inner, role="img", aria_label=describe(shown), width="100%", height="100%"
    )
    plot = tag("div", picture, cls="plot map")
    labels = [
        tag("p", text(t), cls=c, aria_hidden="true")
        for t, c in ((shown.y_label, "y-label"), (shown.x_label, "x-label"))
    ]
    head = tag("figcaption", tag("h3", text(shown.title)) + _scale(top))
    note = tag("p", text(shown.note), cls="note") if shown.note else ""
    return tag("figure", head + tag("div", labels[0] + plot + labels[1], cls="axes s") + note, cls="chart")


def describe(shown: HeatMap) -> str:
    """Return the map in words, for readers who do not see it."""
    first, last = _number(shown.values[0][0]), _number(shown.values[-1][-1])
    return f"{shown.title}: {first} at (1, 1), {last} at ({len(shown.values)}, {len(shown.values[0])})."


def strongest(values: Sequence[Sequence[float]]) -> float:
    """Return the value that has the full color: 1, or the round number above the largest value where all are small.

    >>> strongest([[0.011, 0.034]]), strongest([[0.0, 0.7]]), strongest([[0.0]])
    (0.05, 1.0, 1.0)
    """
    largest = max((value for row in values for value in row if math.isfinite(value)), default=0.0)
    if not 0 < largest <= 0.5:
        return 1.0
    power = math.floor(math.log10(largest))
    return next(top for m in (1, 2, 5, 10) if (top := float(f"{m}e{power}")) >= largest)


def _row(i: int, row: Sequence[float], top: float) -> str:
    """A row of squares; neighbours of the same shade are one rectangle."""
    parts, start = [], 0
    for j in range(1, len(row) + 1):
        if j < len(row) and _shade(row[j], top) == _shade(row[start], top):
            continue
        value = (
            _number(row[start]) if j == start + 1 else f"{_number(min(row[start:j]))} to {_number(max(row[start:j]))}"
        )
        place = f"{i + 1}, {start + 1}" if j == start + 1 else f"{i + 1}, {start + 1} to {j}"
        parts.append(
            f'<rect x="{start}" y="{i}" width="{j - start}" height="1" fill-opacity="{_shade(row[start], top) / _SHADES:.3g}">'
            f"<title>{place}: {value}</title></rect>"
        )
        start = j
    return "".join(parts)


def _shade(value: float, top: float) -> int:
    return round(_SHADES * min(1.0, max(0.0, value / top))) if math.isfinite(value) else 0


def _number(value: float) -> str:
    """A value in two decimals, a small one in two digits."""
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def _numbers(width: int, height: int) -> str:
    """A few row and column numbers, with the first and the last."""
    parts = [
        f'<text x="-8" y="{100 * (n - 0.5) / height:.4g}%" dy="0.32em" text-anchor="end">{n}</text>'
        for n in _few(height)
    ]
    parts += [
        f'<text x="{100 * (n - 0.5) / width:.4g}%" y="100%" dy="1.4em" text-anchor="middle">{n}</text>'
        for n in _few(width)
    ]
    return "".join(parts)


def _few(most: int) -> list[int]:
    if most <= _TICKS + 1:
        return list(range(1, most + 1))
    return sorted({1, *(round(most * i / (_TICKS - 1)) for i in range(1, _TICKS))})


def _scale(top: float) -> str:
    """The shades with the values that they stand for."""
    steps = "".join(f'<rect x="{i}" y="0" width="1" height="1" fill-opacity="{i / 4:.3g}"></rect>' for i in range(5))
    shades = f'<svg class="shades" viewBox="0 0 5 1" width="60" height="12" shape-rendering="crispEdges">{steps}</svg>'
    return tag("p", f"0 {shades} {top:g}", cls="legend", aria_hidden="true")
