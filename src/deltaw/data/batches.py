"""Which examples go into which batch, and batches as tensors. Knows lengths and token ids, nothing of text.

Examples of like length share a batch, so little is computed on padding; which they are is random. All of it follows
from (seed, epoch), so a run resumes at any step without replaying the ones before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
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


def plan(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """All batches of an epoch, as indices into `lengths`; every index once. The same arguments give the same plan.

    Everything is shuffled, cut into windows of `WINDOW * batch`, sorted by length in each window and cut into batches;
    the batches of a window are shuffled again, so that lengths do not rise and fall in a rhythm.
    """
    if batch < 1:
        raise DataError(f"batch is {batch}; it must be at least 1.")
    # a string seed is hashed with SHA-512, so (0, 1) and (1, 0) do not meet
    chance = random.Random(f"deltaw batches {seed} {epoch}")
    order = list(range(len(lengths)))
    chance.shuffle(order)
    planned: list[list[int]] = []
    for at in range(0, len(order), WINDOW * batch):
        window = sorted(order[at : at + WINDOW * batch], key=lengths.__getitem__)
        cut = [window[i : i + batch] for i in range(0, len(window), batch)]
        chance.shuffle(cut)
        planned += cut
    return planned


def batches(lengths: Sequence[int], *, batch: int, seed: int, epoch: int = 0, start: int = 0) -> Iterator[list[int]]:
    """The batches of `plan` from number `start` on."""
    yield from plan(lengths, batch, seed, epoch)[start:]


def collate(examples: Sequence[Example], pad_id: int, most: int | None = None) -> Batch:
    """Examples as one Batch, padded on the right with `pad_id`, which is neither attended to nor supervised. Padding alone
    never makes a row longer than `most` tokens."""
    import torch

    if not examples:
        raise DataError("A batch needs at least one example.")
    longest = max(len(e.input_ids) for e in examples)
    width = -(-longest // MULTIPLE) * MULTIPLE
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
