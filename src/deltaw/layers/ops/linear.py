"""h = W0x + b + scale·B(Ax) as one autograd function (Hu et al. 2021, arXiv 2106.09685, section 4.1). Knows tensors only.

Frozen W0 needs no gradient, which is the whole speed of LoRA: the function saves x and Ax, never the branch's output, adds
the branch into the base product in place, and forms dA, dB and dx with no [tokens, d] or [tokens, k] temporary beyond dx
itself. Layers that read the same x go through it together: one product with their stacked A's, one dx. `reference` is the
same in plain operations, and is what the tests hold this against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
    """Compute W0x + bias + scale·B(Ax).

    The branch is computed in the dtype of the base product (autocast's, where that is on). Gradients of A and B have the dtype of
    A and B.

    Args:
        x: [..., k]
        W0: [d, k], of any strides.
        bias: [d]
        A: [r, k]
        B: [d, r]
        scale: α/r in the paper.
        dropout: Probability of zeroing an entry of the branch's input, while `training`.
        training: Also chooses the faster rounding order: one pass over the output instead of three. Dtypes narrower than fp32
            have that order always.

    Returns:
        [..., d]

    >>> import torch
    >>> x, W0, A, B = torch.ones(1, 3), torch.zeros(2, 3), torch.ones(1, 3), torch.ones(2, 1)
    >>> lowrank_linear(x, W0, None, A, B, scale=2.0)
    tensor([[6., 6.]])
    """
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, W0 = x.to(dtype), W0.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    seed = _seed() if training and dropout > 0.0 else None
    if W0.requires_grad or (bias is not None and bias.requires_grad):
        return reference(x, W0, bias, A, B, scale, dropout, seed)
    (out,) = _together(x, [W0], [bias], A, [B], _How(scale, training, None if seed is None else (dropout, seed)))
    return out


def lowrank_linears(
    x: Tensor,
    W0s: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Tensor,
    Bs: Sequence[Tensor],
    *,
    dropout: float = 0.0,
    frozen: Frozen | None = None,
) -> tuple[Tensor, ...]:
    """Compute W0x + b + B(Ax) of each of several layers that read the same x, for training: the scale is in A already.

    x [..., k]; W0 [d, k], bias [d] and B [d, r] of each layer; A [Σr, k], the layers' A's stacked in order → [..., d] of each.
    All in one dtype, without autocast, W0 and bias frozen. frozen: computes the products of the W0s, stacked in order.
    """
    return _together(x, W0s, biases, A, Bs, _How(1.0, True, (dropout, _seed()) if dropout else None, frozen))


def reference(
    x: Tensor,
    W0: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Compute the same in plain operations, differentiable in all inputs. With a `seed`, that seed's dropout is on."""
    dropped = x if seed is None else x * _mask(x, dropout, seed)
    branch = F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype))
    return F.linear(x, W0, bias) + scale * branch


class Frozen(Protocol):
    """A way to the products of frozen W0, of layers that read the same x."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x·W0ᵀ: [tokens, k] → fp32 [tokens, Σd]."""

    def backward(self, g: Tensor) -> Tensor:
        """Return g·W0: [tokens, Σd] → fp32 [tokens, k]."""


@dataclass(frozen=True)
class _How:
    """The settings of a product, beside its tensors."""

    scale: float
    training: bool
    dropout: tuple[float, int] | None
    """Its probability, and the seed of its mask."""
    frozen: Frozen | None = None
    """Computes the products of W0; None: W0 as it is."""

    def scaled(self, fresh: Tensor) -> Tensor:
        return fresh if self.scale == 1.0 else fresh.mul_(self.scale)

    def dropped(self, x: Tensor) -> Tensor:
        """Return the branch's input, or a gradient on its way back through the same mask."""
        return x if self.dropout is None else x * _mask(x, *self.dropout)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts `x` to; None where it is off or leaves `x` alone."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _seed() -> int:
    """Draw a seed from the CPU's global generator: reading it stalls no GPU, and checkpointing puts it back for the second
    forward."""
    return int(torch.randint(1 << 62, ()))


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Return entries 0 or 1/(1−p), shaped like `x`: drawn again from the seed in the backward pass instead of being stored."""
    # Contiguous whatever x is: entries are drawn in that order
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if mask.is_meta:  # a plan needs its size alone
        return mask
    generator = torch.Generator(x.device).manual_seed(seed)
    return mask.bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)


def _together(
    x: Tensor, W0s: Sequence[Tensor], biases: Sequence[Tensor | None], A: Tensor, Bs: Sequence[Tensor], how: _How
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or any(B.requires_grad for B in Bs)):
        outputs: tuple[Tensor, ...] = _Fused.apply(x, A, how, *W0s, *biases, *Bs)  # type: ignore[no-untyped-call]
        return outputs
    return _forward(x, W0s, biases, A, Bs, how)[0]


def _forward(
    x: Tensor, W0s: Sequence[Tensor], biases: Sequence[Tensor | None], A: Tensor, Bs: Sequence[Tensor], how: _How
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the outputs, each [..., d], and Ax [tokens, Σr]."""
    Ax = how.dropped(_rows(x)) @ A.to(x.dtype).t()
    outputs = []
    for out, B, part in zip(_base(x, W0s, biases, how.frozen), Bs, _parts(Ax, Bs), strict=True):
        Bt = B.to(x.dtype).t()
        # The output is fresh and contiguous, so a view of it can take the branch in place
        flat = out.view(-1, out.shape[-1])
        if how.training or out.dtype.itemsize < torch.float32.itemsize:
            flat.addmm_(part, Bt, alpha=how.scale)  # rounded once
        else:
            # Rounded as the formula is written, which is also PEFT's order: its logits come out the same
            flat.add_(how.scaled(part @ Bt))
        # F.linear's own may be a view to autograd, and a model may change its layer's output in place (RoCBert does)
        outputs.append(torch.ops.aten._unsafe_view(flat, out.shape))
    return tuple(outputs), Ax


def _base(x: Tensor, W0s: Sequence[Tensor], biases: Sequence[Tensor | None], frozen: Frozen | None) -> Iterator[Tensor]:
    """Yield W0x + b of each layer, [..., d], fresh and contiguous."""
    if frozen is None:
        yield from (F.linear(x, W0, bias) for W0, bias in zip(W0s, biases, strict=True))
        return
    outputs = frozen.forward(_rows(x)).to(x.dtype).split([W0.shape[0] for W0 in W0s], dim=1)
    for out, bias in zip(outputs, biases, strict=True):
        yield (out.contiguous() if bias is None else out + bias).view(*x.shape[:-1], out.shape[1])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _parts(Ax: Tensor, Bs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return each layer's columns of Ax."""
    return (Ax,) if len(Bs) == 1 else Ax.split([B.shape[1] for B in Bs], dim=1)


def _joined(grads: Sequence[Tensor | None], widths: Sequence[int], x: Tensor) -> Tensor:
    """Return the gradients of all layers' outputs side by side, [tokens, Σd]; zeros where nothing came of an output."""
    tokens = _rows(x).shape[0]
    parts = [
        x.new_zeros(tokens, width) if grad is None else grad.reshape(tokens, width)
        for grad, width in zip(grads, widths, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, how: _How, *layers: Any) -> tuple[Tensor, ...]:
        n = len(layers) // 3
        W0s, biases, Bs = layers[:n], layers[n : 2 * n], layers[2 * n :]
        outputs, Ax = _forward(x, W0s, biases, A, Bs, how)
        ctx.save_for_backward(x, A, Ax, *W0s, *Bs)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, A, Ax, *layers = ctx.saved_tensors
        n = len(grads)
        W0s, Bs = layers[:n], layers[n:]
        needs_x, needs_A = ctx.needs_input_grad[:2]
        needs_B = ctx.needs_input_grad[3 + 2 * n :]
        dx = dA = None
        dBs: list[Tensor | None] = []
        gB: list[Tensor] = []  # of each layer, [tokens, r]
        for grad, W0, B, part, needed in zip(grads, W0s, Bs, _parts(Ax, Bs), needs_B, strict=True):
            if grad is None:  # nothing came of this layer's output
                gB.append(torch.zeros_like(part))
                dBs.append(None)
                continue
            g = grad.reshape(-1, W0.shape[0])
            # dB by its transpose: twice as fast where r is small and d is large
            dBs.append(ctx.how.scaled(part.t() @ g).t().to(B.dtype) if needed else None)
            if needs_x or needs_A:
                gB.append(g @ B.to(g.dtype))
            if needs_x and ctx.how.frozen is None:
                dx = g @ W0 if dx is None else dx.addmm_(g, W0)
        if needs_x and ctx.how.frozen is not None:
            dx = ctx.how.frozen.backward(_joined(grads, [W0.shape[0] for W0 in W0s], x)).to(x.dtype)
        if gB:
            stacked = ctx.how.scaled(gB[0] if n == 1 else torch.cat(gB, dim=1))
            if needs_A:
                dA = (stacked.t() @ ctx.how.dropped(_rows(x))).to(A.dtype)
            if dx is not None:
                A = A.to(dx.dtype)
                dx = dx.addmm_(stacked, A) if ctx.how.dropout is None else dx.add_(ctx.how.dropped(stacked @ A))
                dx = dx.view(x.shape)
        return dx, dA, None, *[None] * (2 * n), *dBs
