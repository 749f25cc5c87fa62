"""Where the names of points in a chart go: beside them, and not over each other. Knows places in a plot; nothing of charts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# A plot's usual size and that of its letters, in pixels
_WIDTH, _HEIGHT = 980.0, 260.0
_LETTER, _LINE, _GAP = 6.6, 15.0, 9.0


class Name(NamedTuple):
    """A name at a place: x and y in shares of the plot from its left and top, then pixels from there, and which end is there."""

    text: str
    x: float
    y: float
    dx: float
    dy: float
    anchor: str


_Box = tuple[float, float, float, float]


def placed(points: Mapping[str, tuple[float, float]]) -> list[Name]:
    """A name for each point (shares from the left and top): right of it, left of it, below or above, where there is most room."""
    taken: list[_Box] = [(x * _WIDTH - 4, y * _HEIGHT - 4, x * _WIDTH + 4, y * _HEIGHT + 4) for x, y in points.values()]
    found = []
    for text, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        choices = [_at(text, x, y, side, down) for down in (0, 1, -1, 2, -2) for side in ("start", "end")]
        best = min(choices, key=lambda choice: _overlap(_box(choice), taken))
        taken.append(_box(best))
        found.append(best)
    return found


def _at(text: str, x: float, y: float, anchor: str, down: int) -> Name:
    return Name(text, x, y, _GAP if anchor == "start" else -_GAP, 4 + down * _LINE, anchor)


def _box(name: Name) -> _Box:
    """Left, top, right and bottom in pixels."""
    width, at, bottom = _LETTER * len(name.text), name.x * _WIDTH + name.dx, name.y * _HEIGHT + name.dy + 3
    left = at if name.anchor == "start" else at - width
    return left, bottom - _LINE, left + width, bottom


def _overlap(box: _Box, taken: list[_Box]) -> float:
    """The area over others, and what is outside the plot."""
    left, top, right, bottom = box
    outside = max(0.0, -left) + max(0.0, right - _WIDTH) + max(0.0, -top - 8) + max(0.0, bottom - _HEIGHT)
    shared = sum(
        max(0.0, min(right, r) - max(left, a)) * max(0.0, min(bottom, b) - max(top, t)) for a, t, r, b in taken
    )
    return shared + _LINE * outside
