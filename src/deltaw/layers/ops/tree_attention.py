"""Attention over a tree of token stretches in one row, forward and backward, each stretch computed once.

A query attends to the keys of its own stretch up to itself, and to all keys of the stretches above. With the tokens depth first,
the queries below a stretch are the slice right after it. So each stretch takes two blocks of products: its own queries, causally,
and those below it, all against its keys. A query's blocks are put together by their softmax's maximum and mass (Milakov and
Gimelshein 2018, arXiv 1805.02867). No key is copied for its readers, and the backward pass computes each block again from its
row's log mass (Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
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


class Settings(NamedTuple):
    """How scores become weights."""

    scale: float
    window: int | None = None
    """Keys so many positions back, and further, are not attended to."""
    cap: float | None = None
    """Scores s become cap·tanh(s / cap)."""
    dropout: float = 0.0
    seed: int = 0
    """Of dropout's masks."""


def blocks_of(stretches: Sequence[tuple[int, int, int]]) -> tuple[Block, ...]:
    """Return the blocks of stretches (start, stop, end of those below)."""
    blocks = []
    for start, stop, end in stretches:
        blocks.append(Block(slice(start, stop), slice(start, stop), True))
        if end > stop:
            blocks.append(Block(slice(stop, end), slice(start, stop), False))
    return tuple(blocks)


def tree_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, settings: Settings) -> Tensor:
    """Return softmax(QKᵀ·scale)V over each token's path in the tree.

    query [n, heads, t, e]; key [n, key heads, t, e]; value [n, key heads, t, f] → [n, heads, t, f]. A key head serves
    heads / key heads neighbouring query heads.
    """
    out: Tensor = _TreeAttention.apply(query, key, value, plan, settings)  # type: ignore[no-untyped-call]
    return out


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, settings: Settings) -> Tensor:
        q = _by_key_head(query, key.shape[1])
        wide = torch.promote_types(query.dtype, torch.float32)
        n, groups, heads, t, _ = q.shape
        top = q.new_full((n, groups, heads, t, 1), -torch.inf, dtype=wide)
        mass = q.new_zeros((n, groups, heads, t, 1), dtype=wide)
        out = q.new_zeros((n, groups, heads, t, value.shape[-1]), dtype=wide)
        masks = _Masks(settings, q.device)
        for block in plan.blocks:
            scores = _scores(q, key, block, plan, settings)
            before, now = top[..., block.queries, :], scores.amax(-1, keepdim=True)
            now = torch.maximum(before, now)
            weights = scores.sub_(now.clamp(min=torch.finfo(wide).min)).exp_()
            shrunk = (before - now).nan_to_num_(0.0).exp_()
            mass[..., block.queries, :] = mass[..., block.queries, :] * shrunk + weights.sum(-1, keepdim=True)
            weights = masks.drop_(weights).to(value.dtype)
            added = _times(weights, value[..., block.keys, :])
            out[..., block.queries, :] = out[..., block.queries, :] * shrunk + added
            top[..., block.queries, :] = now
        out = (out / mass).to(query.dtype).flatten(1, 2)
        ctx.save_for_backward(query, key, value, out, (top + mass.log()).flatten(1, 2))
        ctx.plan, ctx.settings = plan, settings
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, log_mass = ctx.saved_tensors
        plan, settings = ctx.plan, ctx.settings
        groups = key.shape[1]
        q, dout, log_mass = (_by_key_head(x, groups) for x in (query, grads[0], log_mass))
        common = (grads[0].to(log_mass.dtype) * out).sum(-1, keepdim=True)
        common = _by_key_head(common, groups)
        dq, dk, dv = (torch.zeros_like(x, dtype=log_mass.dtype) for x in (q, key, value))
        masks = _Masks(settings, q.device)
        for block in plan.blocks:
            scores = _scores(q, key, block, plan, settings)
            slopes = None if settings.cap is None else 1 - (scores / settings.cap).square().nan_to_num_(1.0, 1.0, 1.0)
            weights = scores.sub_(log_mass[..., block.queries, :]).exp_()
            of_out = dout[..., block.queries, :]
            dweights = _times(of_out, value[..., block.keys, :].mT).to(weights.dtype)
            kept = masks.mask_like(weights)
            dropped = weights if kept is None else weights * kept
            if kept is not None:
                dweights.mul_(kept)
            dv[..., block.keys, :] += _sum_heads(dropped.to(value.dtype), of_out)
            dscores = dweights.sub_(common[..., block.queries, :]).mul_(weights).mul_(settings.scale)
            if slopes is not None:
                dscores.mul_(slopes)
            dscores = dscores.to(query.dtype)
            dq[..., block.queries, :] += _times(dscores, key[..., block.keys, :])
            dk[..., block.keys, :] += _sum_heads(dscores, q[..., block.queries, :])
        return dq.to(query.dtype).flatten(1, 2), dk.to(key.dtype), dv.to(value.dtype), None, None


def _by_key_head(x: Tensor, groups: int) -> Tensor:
    """Return [n, heads, t, e] as [n, key heads, heads of each, t, e]."""
    return x.unflatten(1, (groups, -1))


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Return [n, groups, heads, a, b] times [n, groups, b, c], as one product for all heads of a group."""
    heads, a = left.shape[2:4]
    return (left.flatten(2, 3) @ right).unflatten(2, (heads, a))


def _sum_heads(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ leftᵀ·right over the heads of a group: [n, groups, heads, a, b], [n, groups, heads, a, c] → [n, groups, b, c]."""
    return left.flatten(2, 3).mT @ right.flatten(2, 3)


def _scores(q: Tensor, key: Tensor, block: Block, plan: Plan, settings: Settings) -> Tensor:
    """Return a block's scores [n, groups, heads, queries, keys] in float32 or wider; −∞ where a query attends to no key."""
    scores = _times(q[..., block.queries, :], key[..., block.keys, :].mT)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(settings.scale)
    if settings.cap is not None:
        scores = scores.div_(settings.cap).tanh_().mul_(settings.cap)
    hidden = _hidden(block, plan, settings)
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _hidden(block: Block, plan: Plan, settings: Settings) -> Tensor | None:
    """Return which keys [queries, keys] the queries of a block do not attend to; None where they attend to all."""
    queries, keys = plan.positions[block.queries, None], plan.positions[None, block.keys]
    later = keys > queries if block.causal else None
    if settings.window is None:
        return later
    far = queries - keys >= settings.window
    return far if later is None else later | far


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

    def drop_(self, weights: Tensor) -> Tensor:
        kept = self.mask_like(weights)
        return weights if kept is None else weights.mul_(kept)
