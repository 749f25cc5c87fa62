"""The way back from a merged weight to its own bits: a copy of it, or what subtracting ΔW misses, compressed. Stamps show that
the weight is still what the merge made of it. Knows tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from deltaw.layers.ops.checksums import Stamp
from deltaw.layers.ops.merging import MergeStats, Product, merge_reversibly_, restore_
from deltaw.layers.ops.residual import Packed, Residual, packed, unpacked


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
    residual: Packed

    @property
    def bytes(self) -> int:
        factors = (self.product.A, self.product.B)
        return self.residual.bytes + sum(t.numel() * t.element_size() for t in factors)

    def restored(self, W: Tensor) -> Tensor:
        A, B, scale = self.product
        back = W.clone()
        kept = Residual(*(part.to(W.device) for part in unpacked(self.residual)))
        restore_(back, Product(A.to(W.device), B.to(W.device), scale), kept)
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
    stats, residual = merge_reversibly_(W0, product)
    return stats, Correction(product, packed(residual))
