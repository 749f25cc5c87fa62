"""The A and B of a given rank that are nearest to a ΔW, and the directions that an update has. Tensor maths only.

Of all matrices of rank r, the first r singular triples make the one nearest to ΔW in the Frobenius norm (Eckart and Young 1936).
How far the directions of two updates are the same, and how they lie to W, are sections 7.2 and 7.3 of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
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
        """Return the first `rank` of them, or as many as hold the share `energy` of ‖ΔW‖²; at least one, and no more than there
        are."""
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
    """Return the triples of ΔW = BA, A [R, k] and B [d, R], or of a stack, without forming it: O((d + k)·R²)."""
    Qb, Rb = torch.linalg.qr(B.detach().double())
    Qa, Ra = torch.linalg.qr(A.detach().double().mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Triples(Qb @ U, S, Vh @ Qa.mT)


def of_factors(A: Tensor, B: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Truncate ΔW = BA, A [R, k] and B [d, R], without forming it, to a rank, or to the share `energy` of ‖ΔW‖².

    >>> import torch
    >>> A, B = torch.eye(2, 3), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> round(of_factors(A, B, rank=1).error, 6)  # 3 of ‖(3, 4)‖ = 5 is left out
    0.6
    """
    return triples(A, B).cut(rank=rank, energy=energy)


def of_matrix(dW: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Truncate any ΔW [d, k] to a rank, or to the share `energy` of ‖ΔW‖²."""
    return Triples(*torch.linalg.svd(dW.detach().double(), full_matrices=False)).cut(rank=rank, energy=energy)


_SEED = 0


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """Return φ(i, j) = ‖V_i·V'_jᵀ‖² / min(i, j) for the first i rows of `one` [n, k] and the first j of `other` [m, k], both
    orthonormal: 1 where one subspace holds the other, 0 where they are at right angles. fp64 [n, m] (section 7.2, equation 4)."""
    shared = (one.double() @ other.double().t()).square().cumsum(0).cumsum(1)
    return shared / _smaller(*shared.shape)


def by_chance(n: int, m: int, k: int) -> Tensor:
    """Return what φ is on average for directions drawn at random in k dimensions: max(i, j) / k. fp64 [n, m]"""
    i, j = torch.arange(1, n + 1).double()[:, None], torch.arange(1, m + 1).double()[None, :]
    return torch.maximum(i, j) / k


def _smaller(n: int, m: int) -> Tensor:
    return torch.minimum(torch.arange(1, n + 1)[:, None], torch.arange(1, m + 1)[None, :]).double()


def right_directions(A: Tensor) -> Tensor:
    """Return the right singular vectors of A [r, k] as rows, the largest singular value's first. fp64 [r, k]"""
    directions: Tensor = torch.linalg.svd(A.detach().double(), full_matrices=False)[2]
    return directions


@dataclass(frozen=True)
class Amplified:
    """Table 7 of the paper, of one layer. U and V are the first r left and right singular directions of a matrix; norms are
    Frobenius norms."""

    rank: int
    by_update: float
    """‖UᵀWVᵀ‖ with those of ΔW: how much of W is in the directions that training chose."""
    by_weight: float
    """With those of W itself: the most there can be."""
    by_chance: float
    """With random ones."""
    weight: float
    """‖W‖"""
    update: float
    """‖ΔW‖, of its first r directions."""

    @property
    def factor(self) -> float:
        """‖ΔW‖ / ‖UᵀWVᵀ‖: by how much what was there already is amplified."""
        return self.update / self.by_update if self.by_update else float("inf")


def amplified(W: Tensor, update: Triples, rank: int) -> Amplified:
    """Return that row for W [d, k] and the singular triples of a ΔW of the same shape."""
    W = W.detach().double().cpu()
    rank = min(rank, len(update.S))
    U, V = update.U[:, :rank], update.Vh[:rank]
    chance = torch.Generator().manual_seed(_SEED)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=chance, dtype=torch.float64)).Q for n in W.shape)
    # Its first values alone: all of them would take minutes on a large layer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        largest = torch.svd_lowrank(W, q=min(*W.shape, rank + 8), niter=6)[1][:rank]
    return Amplified(
        rank, float((U.t() @ W @ V.t()).norm()), float(largest.norm()), float((left.t() @ W @ right).norm()), float(W.norm()),
        float(update.S[:rank].norm()),
    )  # fmt: skip
