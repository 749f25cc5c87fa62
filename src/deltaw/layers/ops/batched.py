"""h_i = W0x_i + b + B_i(A_i x_i): each row i of a batch with an adapter of its own.

Adapters of one rank that are each shared by as many rows are one stack, and a stack is one batched product: a row pays for
its own adapter's arithmetic alone, and each adapter's A and B are read once, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """m adapters of one rank, each for the same number of rows."""

    A: Tensor
    """[m, r, k], times the scale."""
    B: Tensor
    """[m, r, d]: transposed, so that the product with it reads it in order."""
    dropout: float = 0.0
    """Probability of zeroing an entry of the branch's input."""


@dataclass(frozen=True)
class Order:
    """The rows of the batch that each stack has: int64, those of one adapter next to each other."""

    rows: tuple[Tensor, ...]
    """For each stack, [m·count]."""
    back: Tensor | None
    """[n]: where each row of the batch is in the stacks' concatenated rows, one past their end for a row without an adapter.
    None: one stack has all rows, in the batch's own order."""


def order(rows: Sequence[Sequence[int]], n: int, device: torch.device) -> Order:
    """Return the order of a batch of n rows, of which `rows` has those of each stack."""
    flat = [row for members in rows for row in members]
    if len(rows) == 1 and flat == list(range(n)):
        return Order((torch.tensor(flat, device=device),), None)
    back = torch.full((n,), len(flat))
    back[flat] = torch.arange(len(flat))
    return Order(tuple(torch.tensor(members, device=device) for members in rows), back.to(device))


def add_branches(out: Tensor, x: Tensor, stacks: Sequence[Stack], order: Order) -> Tensor:
    """Add each row's branch of x [n, t, k] to out [n, t, d], in place, and return it.

    Branches are computed in their stack's dtype and rounded once to `out`'s.
    """
    if order.back is None:
        (stack,) = stacks
        m, _, d = stack.B.shape
        by_adapter = out.view(m, -1, d)
        Ax = _projected(x, stack)
        sums = by_adapter.baddbmm_(Ax, stack.B) if out.dtype == Ax.dtype else by_adapter.add_(Ax @ stack.B)
        return sums.view(out.shape)
    t, d = out.shape[1:]
    parts = []
    for stack, rows in zip(stacks, order.rows, strict=True):
        branch = torch.bmm(_projected(x.index_select(0, rows), stack), stack.B)
        parts.append(branch.view(-1, t, d).to(out.dtype))
    parts.append(out.new_zeros(1, t, d))
    return out.add_(torch.cat(parts).index_select(0, order.back))


def _projected(x: Tensor, stack: Stack) -> Tensor:
    """Compute A_i x_i of each of a stack's adapters: x [m·count, t, k] → [m, count·t, r]."""
    m, _, k = stack.A.shape
    x = x.reshape(m, -1, k).to(stack.A.dtype)
    if stack.dropout > 0.0:
        x = F.dropout(x, stack.dropout)
    return torch.bmm(x, stack.A.transpose(1, 2))


def stacked(
    As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Stack A [r, k] and B [d, r] of m adapters: [m, r, k] times the scales, and [m, r, d], both rounded once to `dtype`.
    Differentiable."""
    A = torch.stack(tuple(As))
    if any(scale != 1.0 for scale in scales):
        A = A.float() if A.element_size() == 1 else A  # 8 bits have no arithmetic
        A = A * torch.tensor(scales, dtype=A.dtype, device=A.device)[:, None, None]
    return A.to(dtype), torch.stack([B.t() for B in Bs]).to(dtype)
