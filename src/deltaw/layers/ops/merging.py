"""ΔW = (α/r)·B·A as pure tensor maths. Knows no nn.Module, no names, no files.

Merging uses **one arithmetic**, the same bits on every machine, device and thread count:

    t_i = fl(scale · B[:, i]);   ΔW ← fl(ΔW + fl(t_i ⊗ A[i, :])),  i = 0 … r−1;   W' = round(fl(fp32(W0) + ΔW))

Each product and each sum is an fp32 operation of its own, a float64 one where W0 is float64: no BLAS (its order of summation
varies) and no fused multiply-add. Rows are worked in blocks that stay in cache; that changes no bit, because no sum crosses
an element. (The row norms of DoRA do; they are summed in float64 by halving, in one order everywhere.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from deltaw.layers.ops import residual
from deltaw.layers.ops.residual import Residual

# Elements of a block for each thread: a few fp32 buffers of this size nearly stay in cache. In smaller ones, calling them and
# waiting for all threads takes the time. On other devices one launch is dear and there is no such cache, so blocks are as large
# as memory comfortably allows.
_CPU_BLOCK = 1 << 17
_DEVICE_BLOCK = 1 << 25


def times(values: Tensor, factor: float) -> Tensor:
    """Return the values times a number, in their own dtype; also those of 8 bits, for which PyTorch has no arithmetic."""
    if factor == 1.0:
        return values
    wide = values.float() if values.element_size() == 1 else values
    return (wide * factor).to(values.dtype)


@dataclass(frozen=True)
class MergeStats:
    """Figures of one merge into one weight. Norms are Frobenius norms."""

    w0_norm: float
    dw_norm: float
    survived: float
    """⟨W'−W0, ΔW⟩ / ⟨ΔW, ΔW⟩: 1.0 when the rounding of W' kept all of ΔW, 0.0 when it erased it."""
    changed: float
    """Share of the entries of W0 that differ after the merge."""
    largest_change: float
    """max |W'−W0|"""

    @property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W0‖"""
        return self.dw_norm / self.w0_norm if self.w0_norm else float("inf")


class Block(NamedTuple):
    """Some rows of a weight as a change leaves them."""

    rows: slice
    dW: Tensor
    """fp32, float64 of a float64 weight; the next block may overwrite it."""
    after: Tensor | None = None
    """In dW's dtype: the rows with the change, where they are not W0 + dW rounded once."""


class Change(Protocol):
    """A change of one weight W0 by adapters, read as [d, k]."""

    def blocks(self, W0: Tensor) -> Iterator[Block]:
        """Yield all rows in order. The same changes on the same W0 give the same bits everywhere."""
        ...


class Product(NamedTuple):
    """LoRA's: ΔW = scale·B·A. A [r, k], B [d, r], any float dtypes."""

    A: Tensor
    B: Tensor
    scale: float

    def blocks(self, W0: Tensor) -> Iterator[Block]:
        return (Block(rows, dW) for rows, dW in _delta_blocks(self, wide(W0.dtype)))


class Rescaled(NamedTuple):
    """DoRA's (Liu et al. 2024, arXiv 2402.09353): W' = m·(W0 + ΔW) / ‖W0 + ΔW‖, row by row; the magnitude m is [d]."""

    product: Product
    magnitude: Tensor

    def blocks(self, W0: Tensor) -> Iterator[Block]:
        dtype = wide(W0.dtype)
        m = self.magnitude.detach().to(dtype)
        for rows, dW in _delta_blocks(self.product, dtype):
            before = W0[rows].to(dtype)
            V = before + dW
            after = V * (m[rows] / _row_norms(V))[:, None]
            yield Block(rows, after - before, after)


class Value(NamedTuple):
    """Another value in place of W0, of its shape."""

    W: Tensor

    def blocks(self, W0: Tensor) -> Iterator[Block]:
        height, dtype = _height(W0.shape[1], W0.device), wide(W0.dtype)
        for start in range(0, W0.shape[0], height):
            rows = slice(start, min(start + height, W0.shape[0]))
            after = self.W[rows].detach().to(dtype)
            yield Block(rows, after - W0[rows].to(dtype), after)


class Times(NamedTuple):
    """(IA)³'s: each row of W0 times a number, or each column; rows [d], columns [k]."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def blocks(self, W0: Tensor) -> Iterator[Block]:
        height, dtype = _height(W0.shape[1], W0.device), wide(W0.dtype)
        for start in range(0, W0.shape[0], height):
            rows = slice(start, min(start + height, W0.shape[0]))
            before = W0[rows].to(dtype)
            after = before if self.rows is None else before * self.rows[rows].to(dtype)[:, None]
            after = after if self.columns is None else after * self.columns.to(dtype)
            yield Block(rows, after - before, after)


class Stacked(NamedTuple):
    """A ΔW of each matrix of several of one shape that stand one under the other: W0 [E·d, k]. Its blocks have the rows of any
    other change's, so that a sum can go through both side by side."""

    products: Sequence[Product]

    def blocks(self, W0: Tensor) -> Iterator[Block]:
        d, k = self.products[0].B.shape[0], W0.shape[1]
        height, dtype = _height(k, W0.device), wide(W0.dtype)
        for start in range(0, W0.shape[0], height):
            stop = min(start + height, W0.shape[0])
            parts = [self._rows(e, start - e * d, stop - e * d, dtype) for e in range(start // d, -(-stop // d))]
            yield Block(slice(start, stop), parts[0] if len(parts) == 1 else torch.cat(parts))

    def _rows(self, e: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return the rows of the `e`th ΔW that lie between these two, computed in `dtype`."""
        A, B, scale = self.products[e]
        ((_, dW),) = _delta_blocks(Product(A, B[max(0, start) : stop], scale), dtype)
        return dW


class Sum(NamedTuple):
    """Σ weight·ΔW over changes of any kind."""

    terms: Sequence[tuple[Change, float]]

    def blocks(self, W0: Tensor) -> Iterator[Block]:
        weights = [weight for _, weight in self.terms]
        for blocks in zip(*(change.blocks(W0) for change, _ in self.terms), strict=True):
            dW = blocks[0].dW * weights[0]
            for block, weight in zip(blocks[1:], weights[1:], strict=True):
                dW += block.dW * weight
            yield Block(blocks[0].rows, dW)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a merge into a weight of `dtype` computes in: fp32, float64 of a float64 weight."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def summed(terms: Sequence[tuple[Change, float]], dtype: torch.dtype = torch.float32) -> Change:
    """Return the weighted sum as one change of a weight of `dtype`. Products become one product, whose ranks add up; a single
    change at weight 1 stays as it is, and so is exact."""
    first, weight = terms[0]
    if len(terms) == 1 and weight == 1.0:
        return first
    products = [(change, weight) for change, weight in terms if isinstance(change, Product)]
    if len(products) < len(terms):
        return Sum(terms)
    if len(products) == 1:
        (A, B, scale), weight = products[0]
        return Product(A, B, scale * weight)
    A = torch.cat([p.A.detach().to(wide(dtype)) for p, _ in products])
    B = torch.cat([p.B.detach().to(wide(dtype)) * (p.scale * w) for p, w in products], dim=1)
    return Product(A, B, 1.0)


def dense(change: Change, W0: Tensor) -> Tensor:
    """Return ΔW of any change of W0 [d, k]: [d, k] in fp32, in float64 of a float64 W0, by the one arithmetic."""
    dW = torch.empty(W0.shape, dtype=wide(W0.dtype), device=W0.device)
    for block in change.blocks(W0):
        dW[block.rows] = block.dW
    return dW


def merge_(W0: Tensor, change: Change) -> MergeStats:
    """Replace W0 [d, k] in place by round(wide(W0) + ΔW); W0 may be any float dtype and any strides."""
    return _merge(W0, change, write=True)[0]


def merge_reversibly_(W0: Tensor, product: Product) -> tuple[MergeStats, Residual]:
    """Merge as `merge_` does, and return what `restore_` needs beside A and B to give W0's bits back: a byte an entry, nearly
    all of them zero."""
    stats, kept = _merge(W0, product, write=True, reversibly=True)
    assert kept is not None
    return stats, kept


def merge_stats(W0: Tensor, change: Change) -> MergeStats:
    """Return what `merge_` would do, changing nothing."""
    return _merge(W0, change, write=False)[0]


@torch.no_grad()
def restore_(W: Tensor, product: Product, kept: Residual | None = None) -> None:
    """Replace a merged W [d, k] in place by round(wide(W) − scale·B·A): W0 but for a few units in the last place; with what
    `merge_reversibly_` kept, W0 bit for bit."""
    dtype, room = wide(W.dtype), _Room()
    for rows, dW in _delta_blocks(product, dtype):
        merged = room.cast("merged", W[rows].contiguous(), dtype)
        back = room.cast("back", torch.sub(merged, dW, out=room.like("wide back", dW)), W.dtype)
        if kept is not None:
            residual.correct_(back, kept, rows.start * W.shape[1])
        W[rows].copy_(back)


def restored_within(W: Tensor, back: Tensor) -> float:
    """Return how far from W0 an entry can be that `restore_` computes of W without what the merge kept: half a unit in the last
    place of each of the two, where they are largest."""
    precision = torch.finfo(W.dtype).eps + 2 * torch.finfo(wide(W.dtype)).eps
    return precision * float(torch.maximum(W.abs().max(), back.abs().max()))


@torch.no_grad()
def _merge(W0: Tensor, change: Change, *, write: bool, reversibly: bool = False) -> tuple[MergeStats, Residual | None]:
    w0_squared = dw_squared = survived = 0.0
    changed = 0
    extremes = [0.0]
    residuals: list[Residual] = []
    dtype, room = wide(W0.dtype), _Room()
    for rows, dW, whole in change.blocks(W0):
        original = W0[rows].contiguous()
        before = room.cast("before", original, dtype)
        w0_squared += _dot(before, before)
        dw_squared += _dot(dW, dW)
        merged = room.cast(
            "merged", torch.add(before, dW, out=room.like("after", dW)) if whole is None else whole, W0.dtype
        )
        after = room.cast("after", merged, dtype)
        if reversibly:
            back = room.cast("back", torch.sub(after, dW, out=room.like("wide back", dW)), W0.dtype)
            residuals.append(residual.between(original, back, rows.start * W0.shape[1]))
        # In the memory of `before`, unless that is W0's own
        moved = torch.sub(after, before, out=room.like("before", dW))
        survived += _dot(moved, dW)
        changed += _nonzero(moved)
        extremes += [float(moved.amax()), float(moved.amin())]
        if write:
            W0[rows].copy_(merged)  # last: in its own dtype `before` may be a view of W0
    stats = MergeStats(
        w0_norm=w0_squared**0.5,
        dw_norm=dw_squared**0.5,
        survived=survived / dw_squared if dw_squared else 1.0,
        changed=changed / W0.numel(),
        largest_change=float(torch.tensor(extremes, dtype=torch.float64).abs().max()),  # not a number if any is
    )
    return stats, residual.joined(residuals) if reversibly else None


class _Room:
    """Memory that one block after another is worked in. Fresh memory would cost more time than the arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def like(self, use: str, block: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory of a block's shape, and of its dtype or another one; the next block of the same use overwrites it."""
        memory = self._memory.get(use)
        if memory is not None and memory.shape == block.shape:
            return memory
        if memory is None or memory.numel() < block.numel():
            memory = torch.empty(block.shape, dtype=dtype or block.dtype, device=block.device)
        self._memory[use] = memory.view(-1)[: block.numel()].view(block.shape)
        return self._memory[use]

    def cast(self, use: str, block: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a block in `dtype`: itself where it is."""
        return block if block.dtype == dtype else self.like(use, block, dtype).copy_(block)


def _dot(a: Tensor, b: Tensor) -> float:
    """Return ⟨a, b⟩ of two blocks, summed in their dtype, or in float64 where that is too large for it; the caller adds up blocks
    in float64."""
    product = float(torch.dot(a.reshape(-1), b.reshape(-1)))
    return product if math.isfinite(product) else float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double()))


def _nonzero(values: Tensor) -> int:
    """Count the entries that are not zero. On a CPU NumPy does it in a third of PyTorch's time."""
    if values.device.type != "cpu":
        return int(torch.count_nonzero(values))
    return int(numpy.count_nonzero(numpy.not_equal(values.numpy(), 0)))


def _delta_blocks(product: Product, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of ΔW in order, computed in `dtype`, each in a buffer that the next one overwrites."""
    A, B = product.A.detach().to(dtype).contiguous(), product.B.detach().to(dtype)
    T = (B * torch.tensor(product.scale, dtype=dtype, device=B.device)).unsqueeze(-1)
    d, k = B.shape[0], A.shape[1]
    rows_of_A = A.unbind()
    height = _height(k, B.device)
    total = torch.empty(min(height, d), k, dtype=dtype, device=B.device)
    term = torch.empty_like(total)
    for start in range(0, d, height):
        t = T[start : start + height]
        block, products = total[: t.shape[0]], term[: t.shape[0]]
        block.zero_()
        for column, row in zip(t.unbind(1), rows_of_A, strict=True):  # [rows, 1] and [k]
            torch.mul(column, row, out=products)
            block.add_(products)
        yield slice(start, start + t.shape[0]), block


def _height(k: int, device: torch.device) -> int:
    """Return the rows of a block of k columns: the same for all changes of a weight, which a sum of them goes through side by
    side."""
    elements = _CPU_BLOCK * torch.get_num_threads() if device.type == "cpu" else _DEVICE_BLOCK
    return max(1, elements // max(1, k))


def _row_norms(V: Tensor) -> Tensor:
    """Return ‖V[i, :]‖, [d] in V's dtype, with sums in one order on every machine: in float64, the second half added to the
    first."""
    squares = V.double().square()
    width = squares.shape[1]
    while width > 1:
        half = (width + 1) // 2
        squares[:, : width - half] += squares[:, half:width]
        width = half
    return squares[:, 0].sqrt().to(V.dtype)


def delta_norm(A: Tensor, B: Tensor, scale: float) -> float:
    """Return ‖scale·B·A‖ in O((d+k)·r²), without forming ΔW: ‖BA‖² = ⟨BᵀB, AAᵀ⟩. For a stack, it is over all its matrices."""
    A, B = A.detach().double(), B.detach().double()
    return abs(scale) * float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt())
