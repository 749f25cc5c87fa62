"""Student's t for whole degrees of freedom, without scipy: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""

from __future__ import annotations

import functools
import math

import numpy as np


def tail(t: float, dof: int) -> float:
    """P(T > t) for t ≥ 0."""
    angle = math.atan(t / math.sqrt(dof))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    # Each term of the series is the one before times cos² and a ratio of neighbouring whole numbers
    steps = np.arange(2 if dof % 2 else 1, dof - 1, 2, dtype=float)
    terms = np.cumprod(square * steps / (steps + 1))
    if dof % 2 == 0:
        return 0.5 * (1 - sine * (1 + float(terms.sum())))
    series = 0.0 if dof == 1 else sine * math.cos(angle) * (1 + float(terms.sum()))
    return 0.5 - (angle + series) / math.pi


@functools.cache
def quantile(above: float, dof: int) -> float:
    """The t with P(T > t) = `above`, for `above` in (0, 0.5)."""
    low, high = 0.0, 1.0
    while tail(high, dof) > above:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, dof) > above else (low, middle)
    return (low + high) / 2
