"""Hidden states → −log p of the tokens that follow, without a [tokens, vocabulary] tensor. Knows a head and what its model does
to the logits after it; nothing of batches.

With a frozen linear head, a chunk's logits, losses and gradient with respect to the hidden states are computed together, in one
piece of memory, and dropped before the next chunk. A head that is adapted or trained is called as a module, a chunk at a time,
and called again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.layers.kinds import LinearKind, kind_of
from deltaw.layers.patch import slot_of

CHUNK_ELEMENTS = 1 << 24
"""The most logits of a chunk: 64 MB of fp32, whatever the vocabulary."""
CACHED_ELEMENTS = 1 << 20
"""On a CPU, softmax runs over so many entries at a time, which stay in cache between its passes."""
MULTIPLE = 32
"""Positions come in multiples of this: every new shape leaves buffers behind in the CPU's matrix library."""


@dataclass(frozen=True)
class AfterHead:
    """The function from a head's logits z to its model's: cap·tanh(scale·z / cap), or scale·z where there is no cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)


class Head(Protocol):
    """A module whose output is logits; its weight has a row for each token."""

    weight: Tensor
    """[vocabulary, …]"""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """Return logits [n, vocabulary] of hidden states [n, k]."""


def cross_entropy(hidden: Tensor, head: Head, targets: Tensor, after: AfterHead = AfterHead()) -> Tensor:
    """Return −log softmax(after(head(hidden_i)))[targets_i] for each i, [n] in float32 or wider.

    hidden [n, k], targets [n] int64. Differentiable in hidden and in what the head trains.
    """
    if isinstance(head, nn.Linear) and is_frozen_linear(head):
        return chunked_cross_entropy(hidden, head.weight, head.bias, targets, after)
    height = max(1, CHUNK_ELEMENTS // head.weight.shape[0])

    def losses(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(after(_wide(head(rows))), wanted, reduction="none")

    chunks = zip(torch.split(hidden, height), torch.split(targets, height), strict=True)
    return torch.cat([checkpoint(losses, rows, wanted, use_reentrant=False) for rows, wanted in chunks])


def is_frozen_linear(head: nn.Module) -> bool:
    """Return whether a head is a plain product with its weight that nothing trains and no adapter is on."""
    frozen = not any(p.requires_grad for p in head.parameters())
    return isinstance(kind_of(head), LinearKind) and slot_of(head) is None and frozen


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    after: AfterHead = AfterHead(),
    *,
    chunk: int = CHUNK_ELEMENTS,
    cached: int = CACHED_ELEMENTS,
) -> Tensor:
    """Return −log softmax(after(weight·hidden_i + bias))[targets_i] for each i, float32 [n] (float64 for float64).

    hidden [n, k], weight [vocabulary, k] and bias [vocabulary] frozen, targets [n] int64. Differentiable in hidden. `chunk` and
    `cached`: entries of the logits that are computed, and on a CPU worked on, at a time.
    """
    losses: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, after, chunk, cached)  # type: ignore[no-untyped-call]
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, after: AfterHead, size: int, cached: int
    ) -> Tensor:  # fmt: skip
        losses = []
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        height = max(1, size // weight.shape[0] // MULTIPLE) * MULTIPLE
        for start in range(0, hidden.shape[0], height):
            chunk = slice(start, start + height)
            logits = F.linear(hidden[chunk], weight, bias)
            losses.append(_losses_(logits, targets[chunk], after, cached, gradient=dhidden is not None))
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[chunk])
        ctx.save_for_backward(dhidden)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, None, None]:
        (dhidden,) = ctx.saved_tensors
        return (
            (None if dhidden is None else dhidden * grads[0].to(dhidden.dtype)[:, None]),
            None,
            None,
            None,
            None,
            None,
            None,
        )


def _losses_(logits: Tensor, targets: Tensor, after: AfterHead, cached: int, *, gradient: bool) -> Tensor:
    """Return the losses [n] of logits [n, vocabulary] as they come from the head.

    With `gradient`, each row's gradient of its loss with respect to the logits is written in their place.
    """
    n, vocabulary = logits.shape
    height = max(1, cached // vocabulary) if logits.device.type == "cpu" else n
    losses = []
    for start in range(0, n, height):
        rows, y = logits[start : start + height], targets[start : start + height, None]
        z = _wide(rows)
        capped = None
        if after.scale != 1.0:
            z.mul_(after.scale)
        if after.cap is not None:
            capped = z.div_(after.cap).tanh_().clone()
            z.mul_(after.cap)
        top = z.amax(1, keepdim=True)
        wanted = z.gather(1, y)
        mass = z.sub_(top).exp_().sum(1, keepdim=True)
        losses.append((mass.log() + top - wanted).squeeze(1))
        if not gradient:
            continue
        # softmax − one-hot, and back through what came after the head
        z.div_(mass).scatter_add_(1, y, torch.full_like(mass, -1.0))
        if capped is not None:
            z.mul_(capped.square_().neg_().add_(1.0))
        if after.scale != 1.0:
            z.mul_(after.scale)
        if z.dtype != rows.dtype:
            rows.copy_(z)
    return torch.cat(losses)


def _wide(logits: Tensor) -> Tensor:
    """Return the logits in float32 or wider; the same tensor where they are that already."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
