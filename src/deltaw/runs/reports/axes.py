"""Numbers for charts: values that can be drawn, round ticks, short labels, fewer points. Knows no HTML and no SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]

_LARGEST, _SMALLEST = 1e300, 1e-300
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def finite(value: object) -> float | None:
    """Return `value` as a float that can be drawn; None for NaN, ±inf, None and values that would overflow."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    if not abs(number) <= _LARGEST:
        return None
    return number if abs(number) >= _SMALLEST else 0.0


@dataclass(frozen=True)
class Axis:
    """A range of values with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at `low`, 1 at `high`."""
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)

    def labels(self) -> list[str]:
        """Return a label for each tick."""
        return [short(t, 0.0) for t in self.ticks] if self.log else tick_labels(self.ticks)


# Below it a part of a number may be none
_NOTHING = 1e-300


def linear_axis(
    values: Sequence[float], *, count: int = 5, zero: bool = False, snug: bool = False, whole: bool = False,
    most: float = math.inf,
) -> Axis:  # fmt: skip
    """Return an axis with about `count` round ticks. It ends on ticks, or with `snug` on the data; `zero` puts 0 in it.

    It goes below 0 only where a value does, and beyond `most`, the largest value that can be, never. whole: ticks are whole
    numbers.
    """
    values = [0.0 if abs(v) < _NOTHING else v for v in values]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    floor, ceiling = (0.0 if low >= 0 else -math.inf), max(most, high)
    if zero or (not snug and 0 <= low < 0.4 * high):
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = max(abs(low) * 0.1, 0.5 if low == 0 else 0.0)
        low, high = max(low - margin, floor), min(high + margin, ceiling)
    step = max(_step((high - low) / count), 1.0 if whole else 0.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    if snug:
        slack = 1e-9 * (high - low)
        return Axis(low, high, tuple(t for t in ticks if low - slack <= t <= high + slack))
    if ticks[-1] > ceiling * (1 + 1e-9):
        return Axis(ticks[0], ceiling, ticks[:-1])
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(values: Sequence[float]) -> Axis:
    """Return an axis of powers of ten, or of 1-2-5 where these are few, for positive values."""
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3:
        every = math.ceil((last - first) / 6)
        ticks = [10.0**e for e in range(first, last + every, every)]
    else:
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        begin = max((t for t in ticks if t <= low * (1 + 1e-9)), default=ticks[0])
        end = min((t for t in ticks if t >= high * (1 - 1e-9) and t > begin), default=ticks[-1])
        ticks = [t for t in ticks if begin <= t <= end]
        if len(ticks) > 7:
            ticks = [begin, *(t for t in ticks[1:-1] if math.log10(t) % 1 < 1e-9), end]
    return Axis(min(ticks[0], low), max(ticks[-1], high), tuple(ticks), log=True)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return a label for each tick, all with the same unit and number of decimals."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    largest = max((abs(t) for t in ticks), default=0.0)
    unit, mark = _unit(largest)
    decimals = _decimals(step / unit) if step else 2
    return ["0" if abs(t) < step / 1e6 else _minus(f"{t / unit:.{decimals}f}{mark}") for t in ticks]


def short(value: float, step: float = 0.0) -> str:
    """Return a number with four significant digits, or as many as `step` needs, with an SI mark or a power of ten."""
    unit, mark = _unit(abs(value))
    scaled = value / unit
    body = f"{scaled:.{_decimals(step / unit)}f}" if step else f"{scaled:.4g}"
    return _minus(body + mark)


def decimate(points: Sequence[Point], most: int = 1200) -> list[Point]:
    """Return about `most` points at most: each stretch's first, lowest, highest, last and one gap, in their order."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 4))
    kept: set[int] = set()
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        drawn = [i for i in stretch if finite(points[i][0]) is not None and finite(points[i][1]) is not None]
        if len(drawn) < len(stretch):
            kept.add(next(i for i, j in zip(stretch, [*drawn, -1], strict=False) if i != j))
        if drawn:
            kept |= {drawn[0], drawn[-1]}
            kept |= {min(drawn, key=lambda i: points[i][1]), max(drawn, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _step(rough: float) -> float:
    """The 1, 2 or 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _unit(largest: float) -> tuple[float, str]:
    if largest >= 1e15 or 0 < largest < 1e-2:
        exponent = math.floor(math.log10(largest) + 1e-12)
        return 10.0**exponent, f"e{exponent}"
    if largest >= 1e4:
        return next((unit, mark) for unit, mark in _SI if largest >= unit)
    return 1.0, ""


def _decimals(step: float) -> int:
    return min(max(0, -math.floor(math.log10(abs(step)) + 1e-9)), 10)


def _minus(number: str) -> str:
    return number.replace("-", "−")
