"""Records that begin alike, as a tree of stretches of tokens: a stretch that several records share is there once. Knows token
ids, nothing of text or models.

    A B C D     →  A B ─┬─ C D
    A B E               ├─ E ───── F G
    A B E F G           └─ H
    A B H

The tokens of a tree stand in one row, depth first: A B C D E F G H. So the stretches below one, whose tokens attend to it, come
right after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from deltaw.data.encode import Example

if TYPE_CHECKING:
    import torch

LEAST = 16
"""Tokens that a shared stretch must save: a stretch costs small products of its own. Not measured yet."""
WORTHWHILE = 0.9
"""The share of a batch's padded tokens that its tree may have at most. Not measured yet."""
MULTIPLE = 32
"""A tree's row is padded to a multiple of this: kernels are kept for each shape."""


class Stretch(NamedTuple):
    """A run of tokens with one continuation or none, or several records' common beginning. Places in the tree's row."""

    start: int
    stop: int
    end: int
    """End of the stretches below it: tokens from `start` to `end` attend to it."""
    depth: int
    """Tokens before it in its records, which are on its path."""


@dataclass(frozen=True)
class Tree:
    """The tokens of a batch's records, each shared one once."""

    input_ids: torch.Tensor
    """int64 [1, t], padded on the right: padding is a stretch of its own"""
    position_ids: torch.Tensor
    """int64 [1, t]: the place of each token in its records"""
    stretches: tuple[Stretch, ...]
    """Depth first."""
    places: torch.Tensor
    """int64 [n, longest]: the place in the tree's row of each record's tokens"""
    count: int
    """Tokens, without padding."""


def tree_of(examples: Sequence[Example], pad_id: int, padded_tokens: int) -> Tree | None:
    """Return the tree of these records; None where it saves too little of the tokens that they have with their padding."""
    rows = [example.input_ids for example in examples]
    if len(rows) < 2:
        return None
    paths = _paths(rows)
    count = _count(paths)
    if count == sum(map(len, rows)) or _padded(count) > WORTHWHILE * padded_tokens:
        return None
    return _laid_out(rows, paths, pad_id)


def count_of(rows: Sequence[list[int]]) -> int:
    """Return how many tokens a tree of these rows has."""
    return _count(_paths(rows))


def _count(paths: Sequence[Sequence[tuple[int, int]]]) -> int:
    return max(stop for path in paths for _, stop in path)


def _padded(count: int) -> int:
    return -(-count // MULTIPLE) * MULTIPLE


def _paths(rows: Sequence[list[int]]) -> list[list[tuple[int, int]]]:
    """Return the stretches that each row goes through, from its first token on, as places in the tree's row."""
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    alike = [common_length(rows[a], rows[b]) for a, b in itertools.pairwise(order)]
    paths: list[list[tuple[int, int]]] = [[] for _ in rows]
    place = 0
    # Groups of neighbours in that order, and how many of their tokens are laid out
    groups = [(0, len(rows), 0)]
    while groups:
        low, high, begun = groups.pop()
        longest = len(rows[order[low]])
        common = min([longest, *alike[low : high - 1]])
        ends = common if high - low == 1 or (common - begun) * (high - low - 1) >= LEAST else begun
        if ends > begun:
            for i in order[low:high]:
                paths[i].append((place, place + ends - begun))
            place += ends - begun
        if high - low > 1:
            cuts = [low, *(k + 1 for k in range(low, high - 1) if alike[k] == common), high]
            groups += [(a, b, ends) for a, b in reversed(list(itertools.pairwise(cuts)))]
    return paths


def common_length(a: list[int] | bytes, b: list[int] | bytes) -> int:
    """Return how many entries two rows begin with alike."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    low, high = 0, most  # they are alike up to low, and not up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def _laid_out(rows: Sequence[list[int]], paths: Sequence[Sequence[tuple[int, int]]], pad_id: int) -> Tree:
    import torch

    ends: dict[tuple[int, int], int] = {}
    depths: dict[tuple[int, int], int] = {}
    for path in paths:
        depth, last = 0, path[-1][1]
        for start, stop in path:
            ends[start, stop] = max(last, ends.get((start, stop), 0))
            depths[start, stop] = depth
            depth += stop - start
    stretches = [Stretch(start, stop, ends[start, stop], depths[start, stop]) for start, stop in sorted(ends)]
    count = stretches[-1].stop
    width = _padded(count)
    if width > count:
        stretches.append(Stretch(count, width, width, 0))
    ids = torch.full((1, width), pad_id, dtype=torch.int64)
    positions = torch.cat([torch.arange(s.depth, s.depth + s.stop - s.start) for s in stretches])[None]
    places = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, path, of_row in zip(rows, paths, places, strict=True):
        at = torch.cat([torch.arange(start, stop) for start, stop in path])
        of_row[: len(at)] = at
        ids[0, at] = torch.tensor(row)
    return Tree(ids, positions, tuple(stretches), places, count)
