"""The way back from a merged weight to its own bits: a copy of it, or what subtracting ΔW misses, compressed. Stamps show that
the weight is still what the merge made of it. Knows tensors only.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deltaw.layers.ops.checksums import Stamp
from deltaw.layers.ops.merging import MergeStats, Product, merge_reversibly_, restore_
from deltaw.layers.ops.residual import EFFORT, Residual


class Original(Protocol):
    """The way back to one weight's bits."""

    @property
    def bytes(self) -> int:
        """Bytes of memory that it takes while the weight is merged."""
        ...

    def restored(self, W: Tensor) -> Tensor:
        """Return the weight as it was before the merge, from the merged W, which may be any view that the merge was given."""
        ...


@dataclass(frozen=True)
class Copy:
    """A copy of the weight."""

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
