"""The way back from a merged weight to its own bits: a copy of it, or what subtracting ΔW misses, compressed. Stamps show that
the weight is still what the merge made of it. Knows tensors only.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deltaw.lowrank import MergeStats, Product, merge_reversibly_, restore_
from deltaw.residual import EFFORT, Residual


class Original(Protocol):
    """Of one merged weight."""

    @property
    def bytes(self) -> int:
        """Of memory that it takes while the weight is merged."""
        ...

    def restored(self, W: Tensor) -> Tensor:
        """The weight as it was before the merge, from the merged W, which may be any view that the merge was given."""
        ...


@dataclass(frozen=True)
class Copy:
    W0: Tensor

    @property
    def bytes(self) -> int:
        return self.W0.numel() * self.W0.element_size()

    def restored(self, W: Tensor) -> Tensor:
        return self.W0


@dataclass(frozen=True)
class Correction:
    """A few percent of the weight's bytes, and a second merge's time to undo."""

    product: Product
    codes: bytes
    """Compressed."""
    escapes: Tensor

    @property
    def bytes(self) -> int:
        tensors = (self.product.A, self.product.B, self.escapes)
        return len(self.codes) + sum(t.numel() * t.element_size() for t in tensors)

    def restored(self, W: Tensor) -> Tensor:
        codes = torch.frombuffer(bytearray(zlib.decompress(self.codes)), dtype=torch.int8).view(W.shape)
        A, B, scale = self.product
        back = W.clone()
        product = Product(A.to(W.device), B.to(W.device), scale)
        restore_(back, product, Residual(codes.to(W.device), self.escapes.to(W.device)))
        return back


class Stamp(NamedTuple):
    """A tensor's dtype, shape and checksum. Equal stamps mean the same bits in the same places, on whatever device."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: int


@dataclass(frozen=True)
class Kept:
    """One merged weight: the way back, and a stamp of what the merge made of it."""

    original: Original
    stamp: Stamp
    names: tuple[str, ...]
    """The base's names of it, several of a tied one."""


def merge_correctably_(W0: Tensor, product: Product) -> tuple[MergeStats, Correction]:
    """Merge in place, W0 [d, k] of any strides. A and B are copied, since they may change while they are merged."""
    product = Product(product.A.detach().clone(), product.B.detach().clone(), product.scale)
    stats, (codes, escapes) = merge_reversibly_(W0, product)
    packed = zlib.compress(codes.cpu().contiguous().numpy().data, EFFORT)
    return stats, Correction(product, packed, escapes)


# Odd, as all factors of the checksum are: a product with one loses no bit
_FACTOR = -7046029254386353131
# 64-bit words that are worked on at once: the same on all devices, since the checksum goes from block to block
_WORDS = 1 << 16


def stamp(W: Tensor) -> Stamp:
    """Reads a tensor of any dtype and strides once. The checksum depends on the order of the entries."""
    W = W.detach()
    factors = torch.arange(_WORDS, device=W.device) * _FACTOR
    factors = (factors ^ (factors >> 29)) | 1
    total = torch.zeros((), dtype=torch.int64, device=W.device)
    for piece in W.reshape(-1).split(8 * _WORDS // W.element_size()):
        data = piece.contiguous().view(torch.uint8)
        data = torch.nn.functional.pad(data, (0, -len(data) % 8))
        words = data.view(torch.int64) * _FACTOR
        words = words ^ (words >> 32)  # a change of the highest bit alone must not cancel with another
        total = total * _FACTOR + (words * factors[: len(words)]).sum()
    return Stamp(W.dtype, tuple(W.shape), int(total))


def difference(W: Tensor, was: Stamp) -> str | None:
    """Say how W differs from the tensor that was stamped, for messages; None if it does not."""
    if tuple(W.shape) != was.shape:
        return f"it is {list(W.shape)} now, it was {list(was.shape)}"
    if W.dtype != was.dtype:
        return f"it is {_plain(W.dtype)} now, it was {_plain(was.dtype)}"
    return None if stamp(W) == was else "its values have changed"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
