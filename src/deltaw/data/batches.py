"""Which examples go into which batch, and batches as tensors. Knows lengths and token ids, nothing of text.

Examples of like length share a batch, so little is computed on padding; which they are is random. All of it follows
from (seed, epoch), so a run resumes at any step without replaying the ones before.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaw.data.encode import Example
from deltaw.errors import DataError

if TYPE_CHECKING:
    import torch

WINDOW = 50
"""Batches that are sorted together: more means less padding and less randomness."""


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

    @property
    def targets(self) -> int:
        """How many predictions the loss is taken over."""
        return int(self.supervised.sum())


def plan(lengths: Sequence[int], batch: int, seed: int, epoch: int, tokens: int | None = None) -> list[list[int]]:
    """All batches of an epoch, as indices into `lengths`; every index once. The same arguments give the same plan.

    A batch has `batch` records; with `tokens`, as many as fit that many tokens with their padding, and at least one.
    Everything is shuffled, cut into windows of some `WINDOW` batches, sorted by length in each window and cut into batches;
    the batches of a window are shuffled again, so that lengths do not rise and fall in a rhythm. No record is likelier to
    come early or late than another.
    """
    for name, value in (("batch", batch), ("batch_tokens", tokens)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1.")
    # a string seed is hashed with SHA-512, so (0, 1) and (1, 0) do not meet
    chance = random.Random(f"deltaw batches {seed} {epoch}")
    order = list(range(len(lengths)))
    chance.shuffle(order)
    rows = batch if tokens is None else max(1, tokens * len(lengths) // max(1, sum(lengths)))
    planned: list[list[int]] = []
    for at in range(0, len(order), WINDOW * rows):
        window = sorted(order[at : at + WINDOW * rows], key=lengths.__getitem__)
        cut = _by_rows(window, rows) if tokens is None else _by_tokens(window, lengths, tokens)
        chance.shuffle(cut)
        planned += cut
    return planned


def _by_rows(window: list[int], rows: int) -> list[list[int]]:
    return [window[i : i + rows] for i in range(0, len(window), rows)]


def _by_tokens(window: list[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """The window's indices, which rise in length, in order; each batch as large as its padded size allows."""
    cut: list[list[int]] = []
    for index in window:
        if cut and (len(cut[-1]) + 1) * padded(lengths[index]) <= tokens:
            cut[-1].append(index)
        else:
            cut.append([index])
    return cut


def padded(length: int) -> int:
    """Tokens of a row of this length with its padding."""
    return -(-length // MULTIPLE) * MULTIPLE


class Order:
    """The records of each step of a run: a function of (seed, step) alone, so that a resumed run sees the same ones."""

    def __init__(self, lengths: Sequence[int], *, batch: int, seed: int, tokens: int | None = None) -> None:
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self.tokens = tokens
        self._go_to(0, 0)

    def steps(self, epochs: float) -> int:
        """How many steps that many passes over the records take, at least 1."""
        whole = int(epochs)
        part = math.ceil((epochs - whole) * self._count(whole)) if epochs > whole else 0
        return max(1, sum(self._count(epoch) for epoch in range(whole)) + part)

    def at(self, step: int) -> list[int]:
        """Indices of the records of this step, counted from 0 over all epochs."""
        if step < self._first:
            self._go_to(0, 0)
        while step >= self._first + len(self._planned):
            self._go_to(self._epoch + 1, self._first + len(self._planned))
        return self._planned[step - self._first]

    def _go_to(self, epoch: int, first: int) -> None:
        self._epoch, self._first, self._planned = epoch, first, self._plan(epoch)

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan(self.lengths, self.batch, self.seed, epoch, self.tokens)

    def _count(self, epoch: int) -> int:
        return math.ceil(len(self.lengths) / self.batch) if self.tokens is None else len(self._plan(epoch))


def collate(examples: Sequence[Example], pad_id: int, most: int | None = None) -> Batch:
    """Examples as one Batch, padded on the right with `pad_id`, which is neither attended to nor supervised. Padding alone
    never makes a row longer than `most` tokens."""
    import torch

    if not examples:
        raise DataError("A batch needs at least one example.")
    longest = max(len(e.input_ids) for e in examples)
    width = padded(longest)
    shape = (len(examples), width if most is None else max(longest, min(width, most)))
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention = torch.zeros(shape, dtype=torch.int64)
    supervised = torch.zeros(shape, dtype=torch.bool)
    for i, example in enumerate(examples):
        length = len(example.input_ids)
        ids[i, :length] = torch.tensor(example.input_ids)
        attention[i, :length] = 1
        supervised[i, :length] = torch.tensor(example.supervised)
    return Batch(ids, attention, supervised)
