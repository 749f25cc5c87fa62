"""A's and B's of a stack of E matrices (a mixture's experts) as PEFT's files have them: A [E·r, k], one under the other, and
B [d, r·E], E running fastest. Tensor shapes only."""

from __future__ import annotations

from torch import Tensor


def unstacked(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [E, r, k] and B [E, d, r] of the file's, r = `rank`."""
    return A.view(-1, rank, A.shape[1]), B.view(B.shape[0], rank, -1).permute(2, 0, 1).contiguous()


def transposed_in_file(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The file's A and B of the matrices' transposes: of (B_e A_e)ᵀ = A_eᵀ B_eᵀ."""
    if A.shape[0] % rank or B.shape[1] != A.shape[0]:
        return A, B  # of no stack
    A, B = unstacked(A, B, rank)
    return in_file(B.mT, A.mT)


def in_file(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The file's A and B of A [E, r, k] and B [E, d, r]; those of one matrix, A [r, k] and B [d, r], as they are."""
    if A.ndim == 2:
        return A, B
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
