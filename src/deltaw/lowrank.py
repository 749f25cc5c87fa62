"""ΔW = (α/r)·B·A as pure tensor maths. Knows no nn.Module, no names, no files.

Merging uses **one arithmetic**, the same bits on every machine, device and thread count:

    t_i = fl(scale · B[:, i]);   ΔW ← fl(ΔW + fl(t_i ⊗ A[i, :])),  i = 0 … r−1;   W' = round(fl(fp32(W0) + ΔW))

Each product and each sum is an fp32 operation of its own: no BLAS (its order of summation varies) and no fused
multiply-add. Rows are worked in blocks that stay in cache; that changes no bit, because no sum crosses an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of a block: two fp32 buffers of this size fit a core's second-level cache. On other devices one
# launch is dear and there is no such cache, so blocks are as large as memory comfortably allows.
_CPU_BLOCK = 1 << 15
_DEVICE_BLOCK = 1 << 25


@dataclass(frozen=True)
class MergeStats:
    """What one merge did to one weight. Norms are Frobenius norms."""

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


def delta(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """ΔW = scale·B·A by the one arithmetic. A [r, k], B [d, r], any float dtypes → fp32 [d, k]."""
    dW = torch.empty(B.shape[0], A.shape[1], dtype=torch.float32, device=B.device)
    for rows, block in _delta_blocks(A, B, scale):
        dW[rows] = block
    return dW


def merge_(W0: Tensor, A: Tensor, B: Tensor, scale: float) -> MergeStats:
    """Replace W0 [d, k] in place by round(fp32(W0) + scale·B·A); W0 may be any float dtype and any strides."""
    return _merge(W0, A, B, scale, write=True)


def merge_stats(W0: Tensor, A: Tensor, B: Tensor, scale: float) -> MergeStats:
    """What `merge_` would do, changing nothing."""
    return _merge(W0, A, B, scale, write=False)


def _merge(W0: Tensor, A: Tensor, B: Tensor, scale: float, *, write: bool) -> MergeStats:
    sums = torch.zeros(4, dtype=torch.float64, device=W0.device)
    largest = torch.zeros((), dtype=torch.float32, device=W0.device)
    for rows, dW in _delta_blocks(A, B, scale):
        before = W0[rows].float()
        merged = (before + dW).to(W0.dtype)
        change = merged.float() - before
        sums[0] += before.square().sum(dtype=torch.float64)
        sums[1] += dW.square().sum(dtype=torch.float64)
        sums[2] += (change * dW).sum(dtype=torch.float64)
        sums[3] += (change != 0).sum()
        largest = torch.maximum(largest, change.abs().max())
        if write:
            W0[rows] = merged  # last: in fp32 `before` is a view of W0
    w0_squared, dw_squared, kept, changed = sums.tolist()
    return MergeStats(
        w0_norm=w0_squared**0.5,
        dw_norm=dw_squared**0.5,
        survived=kept / dw_squared if dw_squared else 1.0,
        changed=changed / W0.numel(),
        largest_change=float(largest),
    )


def _delta_blocks(A: Tensor, B: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of ΔW in order, each in a buffer that the next one overwrites."""
    A = A.detach().float().contiguous()
    T = B.detach().float() * torch.tensor(scale, dtype=torch.float32, device=B.device)
    d, (r, k) = B.shape[0], A.shape
    height = max(1, (_CPU_BLOCK if B.device.type == "cpu" else _DEVICE_BLOCK) // k)
    total = torch.empty(min(height, d), k, dtype=torch.float32, device=B.device)
    term = torch.empty_like(total)
    for start in range(0, d, height):
        t = T[start : start + height]
        block, product = total[: t.shape[0]], term[: t.shape[0]]
        block.zero_()
        for i in range(r):
            torch.mul(t[:, i : i + 1], A[i], out=product)
            block.add_(product)
        yield slice(start, start + t.shape[0]), block


def delta_norm(A: Tensor, B: Tensor, scale: float) -> float:
    """‖scale·B·A‖ in O((d+k)·r²), without forming ΔW: ‖BA‖² = ⟨BᵀB, AAᵀ⟩."""
    A, B = A.detach().double(), B.detach().double()
    return abs(scale) * float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())
