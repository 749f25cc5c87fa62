"""The A and B of a given rank that are nearest to a ΔW: truncated singular value decompositions, and their error. Tensor
maths only.

Of all matrices of rank r, the first r singular triples make the one nearest to ΔW in the Frobenius norm (Eckart and Young 1936).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Truncated(NamedTuple):
    """ΔW ≈ BA."""

    A: Tensor
    """fp32 [r, k]"""
    B: Tensor
    """fp32 [d, r]; A and B have equal norms."""
    error: float
    """‖ΔW − BA‖ / ‖ΔW‖ in Frobenius norms."""


def of_factors(A: Tensor, B: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Of ΔW = BA, A [R, k] and B [d, R], without forming it: O((d + k)·R²). Give the rank, or the share of ‖ΔW‖² to keep."""
    Qb, Rb = torch.linalg.qr(B.detach().double())
    Qa, Ra = torch.linalg.qr(A.detach().double().t())
    U, S, Vh = torch.linalg.svd(Rb @ Ra.t(), full_matrices=False)
    return _cut(Qb @ U, S, Vh @ Qa.t(), rank, energy, float(S.square().sum()))


def of_matrix(dW: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Of any ΔW [d, k]. Give the rank, or the share of ‖ΔW‖² to keep."""
    dW = dW.detach().double()
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    return _cut(U, S, Vh, rank, energy, float(S.square().sum()))


def _cut(U: Tensor, S: Tensor, Vh: Tensor, rank: int | None, energy: float | None, total: float) -> Truncated:
    kept = S.square().cumsum(0)
    if rank is None:
        assert energy is not None
        rank = int(torch.searchsorted(kept, energy * total * (1 - 1e-12))) + 1
    rank = max(1, min(rank, len(S)))
    root = S[:rank].sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    missing = max(0.0, total - float(kept[rank - 1]))
    return Truncated(A.float(), B.float(), (missing / total) ** 0.5 if total else 0.0)
