"""Batches of examples, planned by length, and as tensors. Knows lengths and token ids, nothing of text.

Examples of similar length share a batch, so little is computed on padding. The batches are random, and others in each epoch. All
of it follows from (seed, epoch), so a run resumes at any step without replaying the ones before.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaw.data.encode import Example
from deltaw.data.groups import packs_of
from deltaw.data.trees import Tree
from deltaw.errors import DataError

if TYPE_CHECKING:
    import torch

WINDOW = 50
"""Most batches that are sorted together: more means less padding and less randomness."""
SHARE = 10
"""A window is at most this part of the records. Sorting all of few records would give the same batches in every epoch."""

COUNTED = 100
"""Epochs whose batches of a token budget are counted, as each has its own number; more are taken to be like these."""


MULTIPLE = 8
"""Rows are padded to a multiple of this. Fewer different shapes: a CPU's kernels are compiled and kept for each shape (without
this, a run's memory grew by a gigabyte), and a GPU's tensor cores want multiples of 8."""


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors of n examples; t is the longest one's tokens, rounded up to a multiple of 8."""

    input_ids: torch.Tensor
    """int64 [n, t]"""
    attention_mask: torch.Tensor
    """int64 [n, t], 1 for tokens, 0 for padding"""
    supervised: torch.Tensor
    """bool [n, t]; True where the loss is taken on predicting this token from those before it"""
    tree: Tree | None = None
    """The same tokens with each shared one once, where that saves enough."""

    @property
    def targets(self) -> int:
        """Predictions that the loss is taken over."""
        return int(self.supervised.sum())

    @property
    def shared(self) -> int:
        """Tokens that its tree saves."""
        return 0 if self.tree is None else int(self.attention_mask.sum()) - self.tree.count


def plan(
    lengths: Sequence[int],
    batch: int,
    seed: int,
    epoch: int,
    tokens: int | None = None,
    groups: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Return all batches of an epoch, as indices into `lengths`; every index once. The same arguments give the same plan.

    A batch has `batch` records; with `tokens`, as many as fit that many tokens with their padding, and at least one.
    The records are shuffled and cut into windows of at most `WINDOW` batches and a tenth (`SHARE`) of all records. A window is
    sorted by padded length, records of one length in random order, and cut into batches. With records for ten batches or fewer,
    nothing is sorted. A batch that is not full may be of any length. The batches come in random order.

    groups: the records in groups whose members are to meet; None for none. They are put into packs, whose records stay side by
    side, unless a batch is full between them. A pack has half of a batch's records at most: a step sees two packs.

    Raises DataError for a size below 1.
    """
    for name, value in (("batch", batch), ("batch_tokens", tokens)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1.")
    if not lengths:
        return []
    # a string seed is hashed with SHA-512, so (0, 1) and (1, 0) do not meet
    chance = random.Random(f"deltaw batches {seed} {epoch}")
    sizes = [padded(length) for length in lengths]
    rows = batch if tokens is None else max(1, tokens * len(sizes) // max(1, sum(sizes)))
    packs = packs_of([[i] for i in range(len(sizes))] if groups is None else groups, max(1, rows // 2), chance)
    width = max(1, min(WINDOW, math.ceil(len(sizes) // rows / SHARE)))  # batches of a window

    def fits(indices: Sequence[int]) -> bool:
        """Return whether these records fit one batch. Where they are sorted, the longest is the first or the last."""
        if tokens is None:
            return len(indices) <= rows
        ends = (indices[0], indices[-1]) if is_sorted else indices
        return len(indices) * max(sizes[i] for i in ends) <= tokens

    is_sorted = width > 1 and groups is None
    # Records of a pack count as long as its longest, so that sorting, which keeps the order of equals, leaves them side by side
    longest = list(sizes)
    for pack in packs:
        most = max(sizes[i] for i in pack)
        for i in pack:
            longest[i] = most
    order = [i for pack in packs for i in pack]
    planned: list[list[int]] = []
    rest: list[int] = []
    for start, stop in _windows(len(order), rows, width):
        window = [*rest, *order[start:stop]]
        batches, rest = _cut(window if width == 1 else sorted(window, key=longest.__getitem__), fits, chance)
        planned += batches
    planned += [rest] if rest else []
    chance.shuffle(planned)
    return planned


def _windows(count: int, rows: int, width: int) -> list[tuple[int, int]]:
    """Return the ends of windows over `count` records, all of nearly the same number of batches.

    A window has at most `width` batches of `rows` records.
    """
    batches = count // rows
    number = math.ceil(batches / width)
    ends = [batches * i // number * rows for i in range(1, number)]
    return list(itertools.pairwise([0, *ends, count]))


def _cut(
    window: list[int], fits: Callable[[Sequence[int]], bool], chance: random.Random
) -> tuple[list[list[int]], list[int]]:
    """Return full batches of a window's records, and the rest for the next window.

    Batches are filled from the window's beginning up to a random one, and from its end down to that: where the records rise in
    length, the rest is of no certain length.
    """
    upwards = _filled(window, fits)
    low = upwards[: chance.randrange(len(upwards))]
    *high, rest = _filled(reversed(window[sum(map(len, low)) :]), fits)
    return ([*low, *high], rest) if fits([*rest, rest[-1]]) else ([*low, *high, rest], [])


def _filled(indices: Iterable[int], fits: Callable[[Sequence[int]], bool]) -> list[list[int]]:
    """Return the indices in order, in batches that are each as large as fits."""
    batches: list[list[int]] = []
    for index in indices:
        if batches and fits([*batches[-1], index]):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def padded(length: int) -> int:
    """Return the tokens of a row of this length with its padding."""
    return -(-length // MULTIPLE) * MULTIPLE


class Order:
    """The records of each step of a run: a function of (seed, step) alone, so that a resumed run sees the same records.

    It keeps the plan of one epoch at a time.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch: int,
        seed: int,
        tokens: int | None = None,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Args: groups: the records in groups whose members are to meet; the other arguments are those of `plan`."""
        self.lengths = lengths
        self.groups = groups
        self.batch = batch
        self.seed = seed
        self.tokens = tokens
        self._epoch, self._first, self._planned = 0, 0, self._plan(0)

    def steps(self, epochs: float) -> int:
        """Return the steps of so many passes over the records, at least 1.

        A step that is begun counts, unless it is a millionth of one, which is rounding: 1.1 passes of 10 batches are 11 steps.
        """
        whole = int(epochs)
        part = math.ceil((epochs - whole) * self._count(whole) - 1e-6) if epochs > whole else 0
        counted = [self._count(epoch) for epoch in range(min(whole, COUNTED))]
        return max(1, part + (round(sum(counted) * whole / len(counted)) if counted else 0))

    def at(self, step: int) -> list[int]:
        """Return the indices of the records of a step, counted from 0 over all epochs."""
        if step < self._first:
            self._go_to(0, 0)
        while step >= self._first + len(self._planned):
            self._go_to(self._epoch + 1, self._first + len(self._planned))
        return self._planned[step - self._first]

    def _go_to(self, epoch: int, first: int) -> None:
        self._epoch, self._first, self._planned = epoch, first, self._plan(epoch)

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan(self.lengths, self.batch, self.seed, epoch, self.tokens, self.groups)

    def _count(self, epoch: int) -> int:
        return math.ceil(len(self.lengths) / self.batch) if self.tokens is None else len(self._plan(epoch))


def collate(examples: Sequence[Example], pad_id: int, most: int | None = None) -> Batch:
    """Return examples as one Batch, padded on the right with `pad_id`, which is neither attended to nor supervised.

    Padding alone never makes a row longer than `most` tokens. Raises DataError without examples.
    """
    import numpy as np
    import torch

    if not examples:
        raise DataError("A batch needs at least one example.")
    lengths = torch.tensor([example.length for example in examples])
    total, longest = int(lengths.sum()), int(lengths.max())
    width = padded(longest)
    width = width if most is None else max(longest, min(width, most))
    there = torch.arange(width) < lengths[:, None]
    # NumPy reads Python's numbers several times as fast as torch.tensor
    tokens = np.fromiter(itertools.chain.from_iterable(e.input_ids for e in examples), np.int64, total)
    marks = np.fromiter(itertools.chain.from_iterable(e.supervised for e in examples), np.bool_, total)
    ids = torch.full(there.shape, pad_id, dtype=torch.int64).masked_scatter_(there, torch.from_numpy(tokens))
    supervised = torch.zeros(there.shape, dtype=torch.bool).masked_scatter_(there, torch.from_numpy(marks))
    return Batch(ids, there.long(), supervised)
