"""Records that begin alike, in groups whose members may meet in a batch: one system prompt of several, one document with many
questions, the turns of one conversation. Knows token ids, nothing of text or models.

What all records begin with makes no groups: it is in every batch anyway.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltaw.data.trees import LEAST, common_length

_WORTH_SAYING = 0.95
"""Share of the tokens up to which it is told that so many are to be computed."""
_WORTH_GROUPING = 0.85
"""The same of the tokens that are computed without groups, up to which groups are advised."""
ALIKE = 0.5
"""Share of the shorter of two neighbours that they begin with alike, if they are of one group. Not measured."""


@dataclass(frozen=True)
class Alike:
    """Records that begin alike. Figures of the first steps."""

    groups: int
    """Groups that the records fall into."""
    a_step: float
    """Groups whose records are in a step together, on average."""
    records_a_step: float
    computed: float
    """Share of the tokens that is there when each common beginning is there once."""
    if_grouped: float
    """The same where records of a group meet in a step (`share: group`)."""
    grouped: bool
    """True where they do."""

    @property
    def text(self) -> str | None:
        """A sentence or two for people; None where there is nothing worth saying."""
        many = f"{self.groups:,} groups that begin alike"
        if self.records_a_step <= 1:
            return None
        if self.grouped:
            return (
                f"Records fall into {many}; a step of {self.records_a_step:.3g} records has {self.a_step:.2g} of them, "
                f"and {self.computed:.0%} of their tokens to compute."
            )
        said = f"Records begin alike: {self.computed:.0%} of a step's tokens are to be computed."
        advice = (
            f"Records fall into {many}: with --share group a step has {self.if_grouped:.0%} of its tokens to compute."
        )
        parts = [said] if self.computed <= _WORTH_SAYING else []
        parts += [advice] if self.if_grouped <= _WORTH_GROUPING * self.computed else []
        return " ".join(parts) or None


def groups_of(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the indices of rows of token ids in groups that begin alike, each group in the order of its tokens.

    A row like no other is a group of its own.
    """
    if not rows:
        return []
    # Bytes of big-endian numbers are in the numbers' order, and are compared at once
    texts = [np.asarray(row, dtype=">u4").tobytes() for row in rows]
    order = sorted(range(len(rows)), key=texts.__getitem__)
    of_all = common_length(texts[order[0]], texts[order[-1]]) // 4
    groups = [[order[0]]]
    for before, row in itertools.pairwise(order):
        shorter = min(len(rows[before]), len(rows[row])) - of_all
        alike = common_length(texts[before], texts[row]) // 4 - of_all
        if alike < max(LEAST, ALIKE * shorter):
            groups.append([])
        groups[-1].append(row)
    return groups


def packs_of(groups: Sequence[Sequence[int]], most: int, chance: random.Random) -> list[list[int]]:
    """Return each group's members in random order, in packs of `most` at most and nearly one size; the packs in random order."""
    packs = []
    for group in groups:
        members = list(group)
        chance.shuffle(members)
        count = -(-len(members) // most)
        ends = [len(members) * i // count for i in range(count + 1)]
        packs += [members[start:stop] for start, stop in itertools.pairwise(ends)]
    chance.shuffle(packs)
    return packs
