"""Dotted names of layers, as people read them. Knows no models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def brief(names: Sequence[str]) -> dict[str, str]:
    """Name → its last parts, as many as tell all of these apart, but no fewer than two."""
    for count in range(2, 1 + max((name.count(".") for name in names), default=0)):
        found = {name: ".".join(name.split(".")[-count:]) for name in names}
        if len(set(found.values())) == len(set(names)):
            return found
    return {name: name for name in names}


def family(name: str) -> str:
    """The name with its numbers as *: layers that differ only in their place in a stack share it."""
    return re.sub(r"\b\d+\b", "*", name)


def by_family(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers that differ in their number alone, together, in the order of their numbers."""
    found: dict[str, list[str]] = {}
    for name in in_order(names):
        found.setdefault(family(name), []).append(name)
    return found


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted with numbers by their value: layer 2 before layer 10, which files have the other way round."""
    return sorted(names, key=lambda name: [(int(p), "") if p.isdecimal() else (-1, p) for p in name.split(".")])


def shown(names: Sequence[str], most: int = 3) -> str:
    """The first of several names, and how many there are besides."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
