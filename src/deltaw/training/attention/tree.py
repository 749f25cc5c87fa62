"""Attention over a tree of token stretches in one row, forward and backward, each stretch computed once.

A query attends to the keys of its own stretch up to itself, and to all keys of the stretches above. With the tokens depth first,
the queries below a stretch are the slice right after it. So each stretch takes two blocks of products: its own queries, causally,
and those below it, all against its keys. A query's blocks are put together by their softmax's maximum and mass (Milakov and
Gimelshein 2018, arXiv 1805.02867). No key is copied for its readers, and the backward pass computes each block again from its
row's log mass (Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """Queries of one slice against the keys of another. A causal one has the same slice for both."""

    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True)
class Plan:
    """The blocks of a tree, and what a score depends on beside its query and key."""

    blocks: tuple[Block, ...]
    positions: Tensor
    """int64 [t]: the place of each token in its records"""
    _masks: dict[int | None, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def hidden(self, block: Block, window: int | None) -> Tensor | None:
        """Return which keys [queries, keys] the queries of a block do not attend to; None where they attend to all."""
        queries, keys = self.positions[block.queries, None], self.positions[None, block.keys]
        later = keys > queries if block.causal else None
        if window is None:
            return later
        far = queries - keys >= window
        return far if later is None else later | far

    def mask(self, window: int | None) -> Tensor:
        """Return which keys each token attends to, bool [t, t]. It is computed once."""
        if window not in self._masks:
            count = len(self.positions)
            mask = torch.zeros(count, count, dtype=torch.bool, device=self.positions.device)
            for block in self.blocks:
                hidden = self.hidden(block, window)
                mask[block.queries, block.keys] = True if hidden is None else ~hidden
            self._masks[window] = mask
        return self._masks[window]


class Settings(NamedTuple):
    """Settings by which scores become weights."""

    scale: float
    window: int | None = None
    """Keys so many positions back, and further, are not attended to."""
    cap: float | None = None
    """Scores s become cap·tanh(s / cap)."""
    dropout: float = 0.0
    seed: int = 0
    """Seed of dropout's masks."""


def blocks_of(stretches: Sequence[tuple[int, int, int]]) -> tuple[Block, ...]:
    """Return the blocks of stretches (start, stop, end of those below), the causal ones first."""
    alone = [Block(slice(start, stop), slice(start, stop), True) for start, stop, _ in stretches]
    below = [Block(slice(stop, end), slice(start, stop), False) for start, stop, end in stretches if end > stop]
    return (*alone, *below)


def tree_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, settings: Settings) -> Tensor:
    """Return softmax(QKᵀ·scale)V over each token's path in the tree.

    query [n, heads, t, e]; key [n, key heads, t, e]; value [n, key heads, t, f] → [n, heads, t, f]. A key head serves
    heads / key heads neighbouring query heads.
    """
    if query.device.type != "cpu" and settings.cap is None:
        return masked_attention(query, key, value, plan, settings)
    out: Tensor = _TreeAttention.apply(query, key, value, plan, settings)  # type: ignore[no-untyped-call]
    return out


def masked_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, settings: Settings) -> Tensor:
    """Return what `tree_attention` does, by PyTorch's attention under a mask of all pairs: a GPU would rather compute too many
    scores in one kernel than the right ones in many."""
    return F.scaled_dot_product_attention(
        query, key, value, plan.mask(settings.window), settings.dropout, scale=settings.scale, enable_gqa=True
    )


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, settings: Settings) -> Tensor:
        q = _by_key_head(query, key.shape[1])
        products = _products(q, value, plan, settings)
        wide = torch.promote_types(query.dtype, torch.float32)
        out = q.new_empty(*q.shape[:-1], value.shape[-1], dtype=wide)
        log_mass = q.new_empty(*q.shape[:-1], 1, dtype=wide)
        for block in plan.blocks:  # the causal ones come first, and have each query once
            at = block.queries
            part, mass = products.forward(q[..., at, :], key[..., block.keys, :], value[..., block.keys, :], block)
            if block.causal:
                out[..., at, :], log_mass[..., at, :] = part, mass
            else:
                both = torch.logaddexp(log_mass[..., at, :], mass)
                out[..., at, :] *= (log_mass[..., at, :] - both).exp_()
                out[..., at, :] += part * (mass - both).exp_()
                log_mass[..., at, :] = both
        result = out.to(query.dtype).flatten(1, 2)
        ctx.save_for_backward(query, key, value, result, log_mass)
        ctx.plan, ctx.settings = plan, settings
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, log_mass = ctx.saved_tensors
        plan, settings = ctx.plan, ctx.settings
        q, out, dout = (_by_key_head(x, key.shape[1]) for x in (query, out, grads[0]))
        products = _products(q, value, plan, settings)
        dq, dk, dv = (torch.zeros_like(x, dtype=log_mass.dtype) for x in (q, key, value))
        for block in plan.blocks:
            at, keys = block.queries, block.keys
            of_q, of_k, of_v = products.backward(
                dout[..., at, :], q[..., at, :], key[..., keys, :], value[..., keys, :], out[..., at, :],
                log_mass[..., at, :], block,
            )  # fmt: skip
            dq[..., at, :] += of_q
            dk[..., keys, :] += of_k
            dv[..., keys, :] += of_v
        return dq.to(query.dtype).flatten(1, 2), dk.to(key.dtype), dv.to(value.dtype), None, None


class _Products(Protocol):
    """A way to a block's products. q, out [n, key heads, heads of each, queries, …]; keys and values [n, key heads, keys, …]."""

    def forward(self, q: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Return softmax(QKᵀ·scale)V over the block's keys, and the log of the softmax's mass, [..., queries, 1]."""

    def backward(
        self, dout: Tensor, q: Tensor, key: Tensor, value: Tensor, out: Tensor, log_mass: Tensor, block: Block
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the block's part in the gradients of q, keys and values. out and log_mass are over all keys of its queries."""


def _products(q: Tensor, value: Tensor, plan: Plan, settings: Settings) -> _Products:
    takes_it = settings.window is None and settings.cap is None and not settings.dropout
    takes_it &= q.dtype in (torch.float32, torch.float64) and q.shape[-1] == value.shape[-1]
    if takes_it and q.device.type == "cpu" and _FUSED is not None:
        return _Fused(settings.scale)
    return _Plain(plan, settings, q.device)


_FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FUSED_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


class _Fused:
    """PyTorch's kernel of a CPU, which gives the log mass and takes one."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(self, q: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        assert _FUSED is not None
        keys, values = (self._keys(x, q, block) for x in (key, value))
        out, log_mass = _FUSED(self._rows(q, block), keys, values, 0.0, block.causal, scale=self.scale)
        return out.reshape(*q.shape[:-1], -1), log_mass.reshape(*q.shape[:-1], 1)

    def backward(
        self, dout: Tensor, q: Tensor, key: Tensor, value: Tensor, out: Tensor, log_mass: Tensor, block: Block
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert _FUSED_BACKWARD is not None
        keys, values = (self._keys(x, q, block) for x in (key, value))
        of_out, queries, outs = (self._rows(x, block) for x in (dout, q, out))
        mass = self._rows(log_mass, block).squeeze(-1)
        dq, dk, dv = _FUSED_BACKWARD(of_out, queries, keys, values, outs, mass, 0.0, block.causal, scale=self.scale)
        dk, dv = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (dk, dv))
        return dq.reshape(q.shape), dk, dv

    @staticmethod
    def _rows(x: Tensor, block: Block) -> Tensor:
        """Return the queries [n, heads, t, …]; where all attend to all keys, a group's heads are more of them."""
        return (x.flatten(1, 2) if block.causal else x.flatten(2, 3)).contiguous()

    @staticmethod
    def _keys(x: Tensor, q: Tensor, block: Block) -> Tensor:
        heads = q.shape[2]
        return x[:, :, None].expand(-1, -1, heads, -1, -1).flatten(1, 2) if block.causal else x


class _Plain:
    """Plain products."""

    def __init__(self, plan: Plan, settings: Settings, device: torch.device) -> None:
        self.plan, self.settings = plan, settings
        self.masks = _Masks(settings, device)

    def forward(self, q: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, key, block)
        top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(top).exp_()
        mass = weights.sum(-1, keepdim=True)
        kept = self.masks.mask_like(weights)
        weights = weights if kept is None else weights.mul_(kept)
        out = _times(weights.to(value.dtype), value).to(mass.dtype)
        return out / mass.clamp(min=torch.finfo(mass.dtype).tiny), top + mass.log()

    def backward(
        self, dout: Tensor, q: Tensor, key: Tensor, value: Tensor, out: Tensor, log_mass: Tensor, block: Block
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, cap = self._scores(q, key, block), self.settings.cap
        slopes = None if cap is None else 1 - (scores / cap).square().nan_to_num_(1.0, 1.0, 1.0)
        weights = scores.sub_(log_mass).exp_()
        dweights = _times(dout, value.mT).to(weights.dtype)
        kept = self.masks.mask_like(weights)
        dropped = weights if kept is None else weights * kept
        if kept is not None:
            dweights.mul_(kept)
        dvalue = _sum_heads(dropped.to(value.dtype), dout)
        common = (dout.to(log_mass.dtype) * out).sum(-1, keepdim=True)
        dscores = dweights.sub_(common).mul_(weights).mul_(self.settings.scale)
        if slopes is not None:
            dscores.mul_(slopes)
        dscores = dscores.to(q.dtype)
        return _times(dscores, key), _sum_heads(dscores, q), dvalue

    def _scores(self, q: Tensor, key: Tensor, block: Block) -> Tensor:
        """Return scores [n, key heads, heads, queries, keys] in float32 or wider; −∞ where a query attends to no key."""
        scores = _times(q, key.mT)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(self.settings.scale)
        if self.settings.cap is not None:
            scores = scores.div_(self.settings.cap).tanh_().mul_(self.settings.cap)
        hidden = self.plan.hidden(block, self.settings.window)
        return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _by_key_head(x: Tensor, groups: int) -> Tensor:
    """Return [n, heads, t, e] as [n, key heads, heads of each, t, e]."""
    split: Tensor = x.unflatten(1, (groups, -1))  # type: ignore[no-untyped-call]
    return split


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Return [n, groups, heads, a, b] times [n, groups, b, c], as one product for all heads of a group."""
    product: Tensor = torch.matmul(left.flatten(2, 3), right)
    heads: Tensor = product.unflatten(2, left.shape[2:4])  # type: ignore[no-untyped-call]
    return heads


def _sum_heads(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ leftᵀ·right over the heads of a group: [n, groups, heads, a, b], [n, groups, heads, a, c] → [n, groups, b, c]."""
    return torch.matmul(left.flatten(2, 3).mT, right.flatten(2, 3))


class _Masks:
    """Dropout's masks, the same ones in the same order in every pass over the blocks."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.share = settings.dropout
        self.random = torch.Generator(device).manual_seed(settings.seed) if self.share else None

    def mask_like(self, weights: Tensor) -> Tensor | None:
        """Return factors of the weights; None where nothing is dropped."""
        if self.random is None:
            return None
        drawn = torch.rand(weights.shape, generator=self.random, device=weights.device, dtype=weights.dtype)
        return (drawn >= self.share).to(weights.dtype).div_(1 - self.share)
