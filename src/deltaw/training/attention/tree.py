"""Attention over a tree of token stretches in one row, forward and backward, each stretch computed once.

A query attends to the keys of its own stretch up to itself, and to all keys of the stretches above. With the tokens depth first,
the queries below a stretch are the slice right after it. So each stretch takes two blocks of scores: its own queries, causally,
and those below it, all against its keys. Stretches of nearly one length take their own blocks together, as the rows of a batch.
A query's blocks are put together by their softmax's maximum and mass (Milakov and Gimelshein 2018, arXiv 1805.02867). No key is
copied for its readers, and the backward pass computes each block again from its row's log mass (Dao et al. 2022, arXiv
2205.14135).

Within a pass, tensors are [rows, tokens, heads, …].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORT = 32
"""Stretches up to here are one batch of rows, whatever their lengths. Longer ones have `_ALIKE` of the longest one's tokens."""
_ALIKE = 0.75


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


class Rows:
    """Own blocks of stretches of nearly one length. The shorter ones are padded on the right."""

    causal = True

    def __init__(self, stretches: Sequence[slice], count: int, device: torch.device) -> None:
        """Args: count: the tokens of the tree. Buffers have a row more, which takes what padding gives."""
        self.stretches = stretches
        self.longest = max(s.stop - s.start for s in stretches)
        offsets = torch.arange(self.longest, device=device)
        starts, stops = (
            torch.tensor([getattr(s, end) for s in stretches], device=device)[:, None] for end in ("start", "stop")
        )
        places = starts + offsets
        self._reads = places.where(places < stops, 0).flatten()
        self._writes = places.where(places < stops, count).flatten()

    def take(self, x: Tensor) -> Tensor:
        """Return the stretches of [tokens, …] as rows [n, longest, …]; padding is like the first token."""
        return self._taken(x, self._reads)

    def take_padded(self, x: Tensor) -> Tensor:
        """Return the stretches of a buffer [tokens + 1, …] as rows [n, longest, …]; padding is like its last row."""
        return self._taken(x, self._writes)

    def put(self, rows: Tensor, into: Tensor) -> None:
        """Write rows [n, longest, …] into a buffer [tokens + 1, …]."""
        if len(self.stretches) == 1:
            into[self.stretches[0]] = rows[0]
        else:
            into.index_copy_(0, self._writes, rows.flatten(0, 1))

    def _taken(self, x: Tensor, places: Tensor) -> Tensor:
        if len(self.stretches) == 1:
            return x[self.stretches[0]][None]
        rows: Tensor = x.index_select(0, places).unflatten(0, (-1, self.longest))  # type: ignore[no-untyped-call]
        return rows

    def hidden(self, window: int | None) -> Tensor | None:
        """Return which keys the queries do not attend to, bool [longest, longest]."""
        places = torch.arange(self.longest, device=self._reads.device)
        back = places[:, None] - places
        return back < 0 if window is None else (back < 0) | (back >= window)


@dataclass(frozen=True)
class Below:
    """The block of the queries below a stretch, and its keys."""

    causal: ClassVar[bool] = False
    queries: slice
    keys: slice
    positions: Tensor
    """int64 [t]: the place of each token in its records"""

    def hidden(self, window: int | None) -> Tensor | None:
        """Return which keys the queries do not attend to, bool [queries, keys]; None where they attend to all."""
        if window is None:
            return None
        return self.positions[self.queries, None] - self.positions[None, self.keys] >= window


class Plan:
    """The blocks of a tree, and what a score depends on beside its query and key."""

    def __init__(self, stretches: Sequence[tuple[int, int, int]], positions: Tensor) -> None:
        """Args: stretches: (start, stop, end of those below), depth first; positions: int64 [t], of each token in its records."""
        self.positions = positions
        count, device = len(positions), positions.device
        longest_first = sorted((slice(start, stop) for start, stop, _ in stretches), key=lambda s: s.start - s.stop)
        self.rows = [Rows(alike, count, device) for alike in _of_one_length(longest_first)]
        self.below = [
            Below(slice(stop, end), slice(start, stop), positions) for start, stop, end in stretches if end > stop
        ]
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """Return which keys each token attends to, bool [t, t]. It is computed once."""
        if window not in self._masks:
            count = len(self.positions)
            mask = torch.zeros(count, count, dtype=torch.bool, device=self.positions.device)
            for stretch in itertools.chain.from_iterable(rows.stretches for rows in self.rows):
                mask[stretch, stretch] = True
            for below in self.below:
                mask[below.queries, below.keys] = True
            back = self.positions[:, None] - self.positions
            self._masks[window] = mask & (back >= 0) & (back < (count if window is None else window))
        return self._masks[window]


def _of_one_length(longest_first: Sequence[slice]) -> list[list[slice]]:
    """Return the stretches in groups that are a batch of rows each."""
    groups: list[list[slice]] = []
    most = 0
    for stretch in longest_first:
        length = stretch.stop - stretch.start
        if not groups or (most > _SHORT and length < _ALIKE * most):
            groups.append([])
            most = length
        groups[-1].append(stretch)
    return groups


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, settings: Settings, sinks: Tensor | None = None
) -> Tensor:
    """Return softmax(QKᵀ·scale)V over each token's path in the tree.

    query [n, heads, t, e]; key [n, key heads, t, e]; value [n, key heads, t, f] → [n, heads, t, f]: n passes over one tree. A key
    head serves heads / key heads neighbouring query heads. sinks [heads]: a score of each head that takes mass and has no value
    (Xiao et al. 2023, arXiv 2309.17453).
    """
    if query.device.type != "cpu" and settings.cap is None and sinks is None:
        return masked_attention(query, key, value, plan, settings)
    out: Tensor = _TreeAttention.apply(query, key, value, sinks, plan, settings)  # type: ignore[no-untyped-call]
    return out


def masked_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, settings: Settings) -> Tensor:
    """Return what `tree_attention` does, by PyTorch's attention under a mask of all pairs: a GPU would rather compute too many
    scores in one kernel than the right ones in many."""
    return F.scaled_dot_product_attention(
        query, key, value, plan.mask(settings.window), settings.dropout, scale=settings.scale, enable_gqa=True
    )


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, plan: Plan, settings: Settings
    ) -> Tensor:
        q, k, v = (_by_token(x) for x in (query, key, value))
        sinks = None if sinks is None else sinks.repeat(len(query))
        products = _products(q, v, settings)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(len(q) + 1, q.shape[1], v.shape[2], dtype=wide)
        log_mass = q.new_empty(out.shape[:2], dtype=wide)
        for rows in plan.rows:  # have each query once
            part, mass = products.forward(rows.take(q), rows.take(k), rows.take(v), rows)
            rows.put(part, out)
            rows.put(mass, log_mass)
        for block in plan.below:
            at, keys = block.queries, block.keys
            part, mass = products.forward(q[None, at], k[None, keys], v[None, keys], block)
            both = torch.logaddexp(log_mass[at], mass[0])
            out[at] *= (log_mass[at] - both).exp_()[..., None]
            out[at] += part[0] * (mass[0] - both).exp_()[..., None]
            log_mass[at] = both
        if sinks is not None:
            both = torch.logaddexp(log_mass, sinks.to(wide))
            out *= (log_mass - both).exp_()[..., None]
            log_mass = both
        log_mass[-1] = torch.inf  # padding has no part in a gradient
        result = out[:-1].to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, result, log_mass)
        ctx.plan, ctx.settings = plan, settings
        return _by_row(result, len(query))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        query, key, value, sinks, out, log_mass = ctx.saved_tensors
        plan = ctx.plan
        q, k, v, dout = (_by_token(x) for x in (query, key, value, grads[0]))
        products = _products(q, v, ctx.settings)
        dq, dk, dv = (x.new_empty(len(x) + 1, *x.shape[1:], dtype=log_mass.dtype) for x in (q, k, v))
        for rows in plan.rows:
            mass = rows.take_padded(log_mass)
            of_out, of_q, of_k, of_v, of_result = (rows.take(x) for x in (dout, q, k, v, out))
            parts = products.backward(of_out, of_q, of_k, of_v, of_result, mass, rows)
            for of_rows, whole in zip(parts, (dq, dk, dv), strict=True):
                rows.put(of_rows.to(whole.dtype), whole)
        for block in plan.below:
            at, keys = block.queries, block.keys
            of_q, of_k, of_v = products.backward(
                dout[None, at], q[None, at], k[None, keys], v[None, keys], out[None, at], log_mass[None, at], block
            )
            dq[at] += of_q[0]
            dk[keys] += of_k[0]
            dv[keys] += of_v[0]
        of_query, of_key, of_value = (
            _by_row(d[:-1].to(x.dtype), len(query)) for d, x in zip((dq, dk, dv), (q, k, v), strict=True)
        )
        of_sinks = None
        if sinks is not None:
            common = (dout.to(log_mass.dtype) * out).sum(-1)
            of_sinks = -((sinks - log_mass[:-1]).exp() * common).sum(0).view(len(query), -1).sum(0).to(sinks.dtype)
        return of_query, of_key, of_value, of_sinks, None, None


def _by_token(x: Tensor) -> Tensor:
    """Return [n, heads, t, e] as [t, n · heads, e]."""
    return x.flatten(0, 1).transpose(0, 1)


def _by_row(x: Tensor, n: int) -> Tensor:
    """Undo `_by_token`."""
    rows: Tensor = x.transpose(0, 1).unflatten(0, (n, -1))  # type: ignore[no-untyped-call]
    return rows


class _Products(Protocol):
    """A way to a block's products. q, out and dout [n, queries, heads, …]; key and value [n, keys, key heads, …]."""

    def forward(self, q: Tensor, key: Tensor, value: Tensor, block: Rows | Below) -> tuple[Tensor, Tensor]:
        """Return softmax(QKᵀ·scale)V over the block's keys, and the log of the softmax's mass, [n, queries, heads]."""

    def backward(
        self, dout: Tensor, q: Tensor, key: Tensor, value: Tensor, out: Tensor, log_mass: Tensor, block: Rows | Below
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the block's part in the gradients of q, key and value. out and log_mass are over all keys of its queries."""


def _products(q: Tensor, value: Tensor, settings: Settings) -> _Products:
    takes_it = settings.window is None and settings.cap is None and not settings.dropout
    takes_it &= q.dtype in (torch.float32, torch.float64) and q.shape[-1] == value.shape[-1]
    if takes_it and q.device.type == "cpu" and _FUSED is not None:
        return _Fused(settings.scale)
    return _Plain(settings, q.device)


_FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FUSED_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


class _Fused:
    """PyTorch's kernel of a CPU, which gives the log mass and takes one. It wants as many key heads as query heads.

    A query head's keys are copied for it where the block is causal. Elsewhere the heads of a key head are more of its queries.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(self, q: Tensor, key: Tensor, value: Tensor, block: Rows | Below) -> tuple[Tensor, Tensor]:
        assert _FUSED is not None
        groups = key.shape[2]
        keys, values = (_keys(x, q, block) for x in (key, value))
        out, log_mass = _FUSED(_queries(q, groups, block), keys, values, 0.0, block.causal, scale=self.scale)
        return _as_tokens(out, q, block), _as_tokens(log_mass[..., None], q, block)[..., 0]

    def backward(
        self, dout: Tensor, q: Tensor, key: Tensor, value: Tensor, out: Tensor, log_mass: Tensor, block: Rows | Below
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert _FUSED_BACKWARD is not None
        groups = key.shape[2]
        keys, values = (_keys(x, q, block) for x in (key, value))
        of_out, queries, outs, mass = (_queries(x, groups, block) for x in (dout, q, out, log_mass[..., None]))
        dq, dk, dv = _FUSED_BACKWARD(
            of_out, queries, keys, values, outs, mass[..., 0], 0.0, block.causal, scale=self.scale
        )
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2).transpose(1, 2) for x in (dk, dv))
        return _as_tokens(dq, q, block), dk, dv


def _queries(x: Tensor, groups: int, block: Rows | Below) -> Tensor:
    """Return [n, queries, heads, …] as the kernel takes it: [n, heads, queries, …], or [n, key heads, queries · heads, …]."""
    if block.causal or groups == x.shape[2]:
        return x.transpose(1, 2)
    by_group: Tensor = x.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)  # type: ignore[no-untyped-call]
    return by_group


def _keys(x: Tensor, q: Tensor, block: Rows | Below) -> Tensor:
    """Return [n, keys, key heads, e] as [n, heads, keys, e], or [n, key heads, keys, e]."""
    times = q.shape[2] // x.shape[2]
    return (x.repeat_interleave(times, 2) if block.causal and times > 1 else x).transpose(1, 2)


def _as_tokens(x: Tensor, q: Tensor, block: Rows | Below) -> Tensor:
    """Undo `_queries`, of a tensor with its shape but for the last dimension."""
    n, count, heads, _ = q.shape
    if x.shape[1] == heads:
        return x.transpose(1, 2)
    return x.unflatten(2, (count, -1)).transpose(1, 2).reshape(n, count, heads, -1)  # type: ignore[no-untyped-call,no-any-return]


class _Plain:
    """Plain products."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.masks = _Masks(settings, device)

    def forward(self, q: Tensor, key: Tensor, value: Tensor, block: Rows | Below) -> tuple[Tensor, Tensor]:
        queries, keys, values = _by_key_head(q, key.shape[2]), key.transpose(1, 2), value.transpose(1, 2)
        scores = self._scores(queries, keys, block)
        top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(top).exp_()
        mass = weights.sum(-1, keepdim=True)
        kept = self.masks.mask_like(weights)
        weights = weights if kept is None else weights.mul_(kept)
        out = _times(weights.to(value.dtype), values).to(mass.dtype)
        out = out / mass.clamp(min=torch.finfo(mass.dtype).tiny)
        return _of_tokens(out), _of_tokens(top + mass.log())[..., 0]

    def backward(
        self, dout: Tensor, q: Tensor, key: Tensor, value: Tensor, out: Tensor, log_mass: Tensor, block: Rows | Below
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_out, queries, outs, mass = (_by_key_head(x, key.shape[2]) for x in (dout, q, out, log_mass[..., None]))
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        scores, cap = self._scores(queries, keys, block), self.settings.cap
        slopes = None if cap is None else 1 - (scores / cap).square().nan_to_num_(1.0, 1.0, 1.0)
        weights = scores.sub_(mass).exp_()
        dweights = _times(of_out, values.mT).to(weights.dtype)
        kept = self.masks.mask_like(weights)
        dropped = weights if kept is None else weights * kept
        if kept is not None:
            dweights.mul_(kept)
        dvalue = _sum_heads(dropped.to(value.dtype), of_out)
        common = (of_out.to(mass.dtype) * outs).sum(-1, keepdim=True)
        dscores = dweights.sub_(common).mul_(weights).mul_(self.settings.scale)
        if slopes is not None:
            dscores.mul_(slopes)
        dscores = dscores.to(q.dtype)
        dq, dk = _times(dscores, keys), _sum_heads(dscores, queries)
        return _of_tokens(dq), dk.transpose(1, 2), dvalue.transpose(1, 2)

    def _scores(self, queries: Tensor, keys: Tensor, block: Rows | Below) -> Tensor:
        """Return scores [n, key heads, heads, queries, keys] in float32 or wider; −∞ where a query attends to no key."""
        scores = _times(queries, keys.mT)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(self.settings.scale)
        if self.settings.cap is not None:
            scores = scores.div_(self.settings.cap).tanh_().mul_(self.settings.cap)
        hidden = block.hidden(self.settings.window)
        return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _by_key_head(x: Tensor, groups: int) -> Tensor:
    """Return [n, t, heads, e] as [n, key heads, heads of each, t, e]."""
    split: Tensor = x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # type: ignore[no-untyped-call]
    return split


def _of_tokens(x: Tensor) -> Tensor:
    """Undo `_by_key_head`."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


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
