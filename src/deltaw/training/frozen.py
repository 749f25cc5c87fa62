"""The products of frozen W0 in 8 bits, h = x·W0ᵀ and dx = g·W0. Knows tensors only.

W0 is read twice a step and never written. Both factors of a product are rounded to integers of 8 bits, with a scale for each row.
Two things keep the error small. Both are rotated along the dimension that is summed over, in blocks of a Hadamard matrix, which
spreads a row's large entries over their block (Ashkboos et al. 2024, arXiv 2404.00456). And the columns of x with the largest
entries are multiplied in full precision (Dettmers et al. 2022, arXiv 2208.07339, section 3).

One copy of W0 serves both products: it is rotated along k, with a scale for each output. For dx these scales go to g.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LEVELS = 127
BLOCK = 64
"""Most entries that a rotation mixes."""
COLUMNS = 8
"""Columns of x that are multiplied in full precision."""


class Int8:
    """W0 of layers that read the same x, in 8 bits."""

    def __init__(self, W0s: Sequence[Tensor], largest: Tensor) -> None:
        """Args: W0s: [d, k] of each layer, in float32 or narrower; largest: [k], the largest entry of each of x's columns."""
        W0 = torch.cat([W.detach().float() for W in W0s])
        count = min(COLUMNS, W0.shape[1] - 1)
        self.columns = largest.topk(count).indices
        """int64 [columns]"""
        self.beside = W0[:, self.columns]
        """W0's columns that stay as they are, fp32 [Σd, columns]"""
        self.H = hadamard(W0.shape[1], W0.device)
        """[block, block]"""
        self.codes, self.scales = quantised(rotated(W0.index_fill(1, self.columns, 0.0), self.H))
        """int8 [Σd, k], fp32 [Σd, 1]"""

    def forward(self, x: Tensor) -> Tensor:
        """Return x·W0ᵀ: [tokens, k] → fp32 [tokens, Σd]."""
        codes, scales = quantised(rotated(x.index_fill(1, self.columns, 0.0), self.H))
        out = product(codes, self.codes.t()).mul_(scales).mul_(self.scales.t())
        return out.addmm_(x[:, self.columns].to(out.dtype), self.beside.t())

    def backward(self, g: Tensor) -> Tensor:
        """Return g·W0: [tokens, Σd] → fp32 [tokens, k]."""
        codes, scales = quantised(g * self.scales.t())
        out = rotated(product(codes, self.codes).mul_(scales), self.H)
        return out.index_copy_(1, self.columns, g.to(out.dtype) @ self.beside)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [n, k] as int8, and their scales, fp32 [n, 1]. A row with NaN or infinity has a scale that is not finite."""
    x = x.float()
    scales = x.abs().amax(1, keepdim=True).div_(LEVELS)
    return x.div(scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8), scales


@functools.cache
def hadamard(k: int, device: torch.device) -> Tensor:
    """Return the orthogonal Hadamard matrix, fp32 [b, b]: b is the largest power of two up to 64 that divides k."""
    H: Tensor = torch.ones(1, 1)
    while len(H) < BLOCK and k % (2 * len(H)) == 0:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H.div(len(H) ** 0.5).to(device)


def rotated(x: Tensor, H: Tensor) -> Tensor:
    """Return [n, k] with each block of its columns multiplied by H, in fp32. Twice is once: H is symmetric and orthogonal."""
    mixed: Tensor = (x.float().unflatten(1, (-1, len(H))) @ H).flatten(1)  # type: ignore[no-untyped-call]
    return mixed


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of int8 [m, k] and [k, n] in fp32, exact to its rounding. In integers where that is faster."""
    if a.device.type == "meta" or is_faster(a.device.type):
        return torch._int_mm(a, b).float()
    return a.float() @ b.float()


@functools.cache
def is_faster(device: str) -> bool:
    """Return whether products of int8 are faster than those of fp32 here. It is measured once, in some milliseconds."""
    a, b = (
        torch.ones(256, 512, dtype=torch.int8, device=device),
        torch.ones(512, 512, dtype=torch.int8, device=device),
    )
    x, y = a.float(), b.float()
    try:
        torch._int_mm(a, b)
    except (RuntimeError, NotImplementedError):
        return False
    return _seconds(lambda: torch._int_mm(a, b), device) < _seconds(lambda: x @ y, device)


def _seconds(compute: Callable[[], object], device: str) -> float:
    """Return the least time of three calls."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        compute()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
