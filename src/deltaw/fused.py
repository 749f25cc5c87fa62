"""h = W0x + b + scale·B(Ax) as one autograd function. Knows tensors only: no names, no modules, no files.

Frozen W0 needs no gradient, which is the whole speed of LoRA: this function saves x and Ax, never the branch's
output, adds the branch into the base product in place, and forms dA, dB and dx with no [tokens, d] or [tokens, k]
temporary beyond dx itself. `reference` is the same in plain operations, and is what the tests hold this against.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lowrank_linear(
    x: Tensor,
    W0: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
    *,
    training: bool = True,
) -> Tensor:
    """x [..., k], W0 [d, k] (any strides), bias [d], A [r, k], B [d, r] → [..., d].

    The branch is computed in the dtype of the base product (autocast's, where that is on); gradients of A and B
    come back in their own dtype. `dropout` is the probability of zeroing an entry of the branch's input; it and the
    faster rounding order (one pass over the output instead of three) are for `training` only.
    """
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, W0 = x.to(dtype), W0.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    dropout = dropout if training else 0.0
    if W0.requires_grad or (bias is not None and bias.requires_grad) or dropout > 0.0:
        return reference(x, W0, bias, A, B, scale, dropout)
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        return _Fused.apply(x, W0, bias, A, B, scale, training)
    return _add_branch(x, W0, bias, A, B, scale, training)[0]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts `x` to; None where it is off or leaves `x` alone."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def reference(
    x: Tensor, W0: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """The same in plain operations, differentiable in everything."""
    branch = F.linear(F.linear(F.dropout(x, dropout), A.to(x.dtype)), B.to(x.dtype))
    return F.linear(x, W0, bias) + scale * branch


def _add_branch(
    x: Tensor, W0: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, training: bool
) -> tuple[Tensor, Tensor]:
    """The output [..., d] and Ax [tokens, r]."""
    out = F.linear(x, W0, bias)
    Ax = x.reshape(-1, x.shape[-1]) @ A.to(x.dtype).t()
    Bt = B.to(x.dtype).t()
    # F.linear's output is fresh and contiguous, so a view of it can take the branch in place
    flat = out.view(-1, out.shape[-1])
    if training:
        flat.addmm_(Ax, Bt, alpha=scale)
    else:
        # Rounded as the formula is written, which is also PEFT's order: its logits come out the same
        flat.add_((Ax @ Bt).mul_(scale))
    return out, Ax


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W0: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, training: bool
    ) -> Tensor:
        out, Ax = _add_branch(x, W0, bias, A, B, scale, training)
        ctx.save_for_backward(x, W0, A, B, Ax)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W0, A, B, Ax = ctx.saved_tensors
        g = grads[0].reshape(-1, W0.shape[0])
        needs_x, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        dx = dA = dB = None
        gB = (g @ B.to(g.dtype)).mul_(ctx.scale) if needs_x or needs_A else g  # [tokens, r]
        if needs_B:
            dB = (g.t() @ Ax).mul_(ctx.scale).to(B.dtype)
        if needs_A:
            dA = (gB.t() @ x.reshape(-1, x.shape[-1])).to(A.dtype)
        if needs_x:
            dx = (g @ W0).addmm_(gB, A.to(g.dtype)).view(x.shape)
        return dx, None, None, dA, dB, None, None
