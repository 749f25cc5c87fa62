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


class Triples(NamedTuple):
    """ΔW = U·diag(S)·Vh in fp64, singular values falling. Of a stack of E matrices, each has the first dimension E."""

    U: Tensor
    """[d, n]"""
    S: Tensor
    """[n]"""
    Vh: Tensor
    """[n, k]"""

    @property
    def squares(self) -> Tensor:
        """σ² [n]; of a stack, its matrices' together."""
        return self.S.square().reshape(-1, self.S.shape[-1]).sum(0)

    def cut(self, *, rank: int | None = None, energy: float | None = None) -> Truncated:
        """The first `rank` of them, or as many as hold the share `energy` of ‖ΔW‖²; at least one, and no more than there are."""
        kept = self.squares.cumsum(0)
        total = float(kept[-1])
        if rank is None:
            assert energy is not None
            rank = int(torch.searchsorted(kept, energy * total * (1 - 1e-12))) + 1
        rank = max(1, min(rank, len(kept)))
        root = self.S[..., :rank].sqrt()
        A, B = root[..., None] * self.Vh[..., :rank, :], self.U[..., :rank] * root[..., None, :]
        missing = max(0.0, total - float(kept[rank - 1]))
        return Truncated(A.float(), B.float(), (missing / total) ** 0.5 if total else 0.0)


def triples(A: Tensor, B: Tensor) -> Triples:
    """Of ΔW = BA, A [R, k] and B [d, R], or of a stack of them, without forming it: O((d + k)·R²)."""
    Qb, Rb = torch.linalg.qr(B.detach().double())
    Qa, Ra = torch.linalg.qr(A.detach().double().mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Triples(Qb @ U, S, Vh @ Qa.mT)


def of_factors(A: Tensor, B: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Of ΔW = BA, A [R, k] and B [d, R], without forming it. Give the rank, or the share of ‖ΔW‖² to keep."""
    return triples(A, B).cut(rank=rank, energy=energy)


def of_matrix(dW: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Of any ΔW [d, k]. Give the rank, or the share of ‖ΔW‖² to keep."""
    return Triples(*torch.linalg.svd(dW.detach().double(), full_matrices=False)).cut(rank=rank, energy=energy)
