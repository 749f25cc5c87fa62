"""Which directions an update has: how far those of two updates are the same, and how they lie to W (section 7 of the paper).
Tensor maths only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.svd import Triples

_SEED = 0


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """φ(i, j) = ‖V_i·V'_jᵀ‖² / min(i, j) for the first i rows of `one` [n, k] and the first j of `other` [m, k], both
    orthonormal: 1 where one subspace holds the other, 0 where they are at right angles. fp64 [n, m] (section 7.2, equation 4)."""
    shared = (one.double() @ other.double().t()).square().cumsum(0).cumsum(1)
    return shared / _smaller(*shared.shape)


def by_chance(n: int, m: int, k: int) -> Tensor:
    """What φ is on average for directions drawn at random in k dimensions: max(i, j) / k. fp64 [n, m]"""
    i, j = torch.arange(1, n + 1).double()[:, None], torch.arange(1, m + 1).double()[None, :]
    return torch.maximum(i, j) / k


def _smaller(n: int, m: int) -> Tensor:
    return torch.minimum(torch.arange(1, n + 1)[:, None], torch.arange(1, m + 1)[None, :]).double()


def right_directions(A: Tensor) -> Tensor:
    """The right singular vectors of A [r, k] as rows, the largest singular value's first. fp64 [r, k]"""
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


def amplified(W: Tensor, found: Triples, rank: int) -> Amplified:
    """Of W [d, k] and the singular triples of a ΔW of the same shape."""
    W = W.detach().double().cpu()
    rank = min(rank, len(found.S))
    U, V = found.U[:, :rank], found.Vh[:rank]
    chance = torch.Generator().manual_seed(_SEED)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=chance, dtype=torch.float64)).Q for n in W.shape)
    # Its first values alone: all of them would take minutes on a large layer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        own = torch.svd_lowrank(W, q=min(*W.shape, rank + 8), niter=6)[1][:rank]
    return Amplified(
        rank, float((U.t() @ W @ V.t()).norm()), float(own.norm()), float((left.t() @ W @ right).norm()), float(W.norm()),
        float(found.S[:rank].norm()),
    )  # fmt: skip
