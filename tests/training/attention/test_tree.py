"""Attention over a tree, and its gradients: attention under a mask of all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaw.training.attention import tree as ops
from deltaw.training.attention.tree import Plan, Settings, masked_attention, tree_attention

# start, stop, end: a beginning, two below it of which one has two more, and padding
STRETCHES = [(0, 7, 30), (7, 12, 24), (12, 18, 18), (18, 24, 24), (24, 30, 30), (30, 32, 32)]
POSITIONS = torch.tensor([*range(7), *range(7, 12), *range(12, 18), *range(12, 18), *range(7, 13), 0, 1])
PLAN = Plan(STRETCHES, POSITIONS)


def inputs(dtype: torch.dtype = torch.float64, heads: int = 6, wide: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((1, heads, 32, 8), (1, 3, 32, 8), (1, 3, 32, wide))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def by_pairs(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, cap: float | None) -> Tensor:
    """Each query against each key: those on its path, which are no later, and not too far."""
    on_path = torch.zeros(32, 32, dtype=torch.bool)
    for start, stop, end in STRETCHES:
        on_path[start:end, start:stop] = True
    far = POSITIONS[:, None] - POSITIONS
    on_path &= (far >= 0) & (far < (window or 100))
    times = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(times, 1).mT * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return scores.masked_fill(~on_path, -torch.inf).softmax(-1) @ value.repeat_interleave(times, 1)


@pytest.mark.parametrize("heads", [3, 6])
@pytest.mark.parametrize("wide", [8, 5])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (4, None), (None, 1.5), (9, 1.5)])
def test_it_is_attention_on_each_path(heads: int, wide: int, window: int | None, cap: float | None) -> None:
    of = inputs(heads=heads, wide=wide)
    out, wanted = tree_attention(*of, PLAN, Settings(0.4, window, cap)), by_pairs(*of, 0.4, window, cap)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    slope = torch.randn_like(wanted)
    for ours, theirs in zip(torch.autograd.grad(out, of, slope), torch.autograd.grad(wanted, of, slope), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_stretches_of_any_lengths_are_rows_of_their_own() -> None:
    """Stretches beyond 32 tokens meet only those of nearly their length; shorter ones any."""
    torch.manual_seed(1)
    lengths = [70, 40, 3, 33, 60, 1, 58, 32, 45]
    stops = [70 + sum(lengths[1 : i + 1]) for i in range(len(lengths))]
    stretches = [
        (stop - n, stop, stops[-1] if i == 0 else stop) for i, (n, stop) in enumerate(zip(lengths, stops, strict=True))
    ]
    positions = torch.cat([torch.arange(70), *(torch.arange(70, 70 + n) for n in lengths[1:])])
    plan = Plan(stretches, positions)
    assert [len(rows.stretches) for rows in plan.rows] == [3, 2, 2, 2] and plan.rows[0].longest == 70
    of = [torch.randn(1, heads, stops[-1], 8, dtype=torch.float64, requires_grad=True) for heads in (6, 3, 3)]
    slope = torch.randn_like(of[0])
    for settings in (Settings(0.4), Settings(0.4, window=20)):
        ours, theirs = (f(*of, plan, settings) for f in (tree_attention, masked_attention))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        pairs = zip(torch.autograd.grad(ours, of, slope), torch.autograd.grad(theirs, of, slope), strict=True)
        for gradient, wanted in pairs:
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [None, 4])
def test_a_mask_of_all_pairs_gives_the_same(window: int | None) -> None:
    of = inputs()
    torch.testing.assert_close(masked_attention(*of, PLAN, Settings(0.4, window)), by_pairs(*of, 0.4, window, None))


def test_plain_products_give_what_the_fused_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    of, settings = inputs(torch.float32), Settings(0.4)
    fused = tree_attention(*of, PLAN, settings)
    of_fused = torch.autograd.grad(fused.square().sum(), of)
    monkeypatch.setattr(ops, "_FUSED", None)
    plain = tree_attention(*of, PLAN, settings)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_fused, torch.autograd.grad(plain.square().sum(), of), rtol=1e-4, atol=1e-4)


def test_half_precision_sums_in_float32() -> None:
    of = inputs(torch.bfloat16)
    out = tree_attention(*of, PLAN, Settings(0.4))
    assert out.dtype == torch.bfloat16
    wanted = by_pairs(*(x.detach().double() for x in of), 0.4, None, None)
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=2e-2)


def test_dropout_drops_the_same_entries_in_both_passes() -> None:
    of = inputs()
    settings = Settings(0.4, dropout=0.3, seed=5)
    assert torch.autograd.gradcheck(lambda *x: tree_attention(*x, PLAN, settings), of, atol=1e-6)
    outs = [tree_attention(*of, PLAN, Settings(0.4, dropout=0.3, seed=seed)) for seed in (5, 5, *range(6, 400))]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    mean = torch.stack(outs[1:]).mean(0)
    torch.testing.assert_close(mean, by_pairs(*of, 0.4, None, None), rtol=0.2, atol=0.2)


def test_a_sink_takes_mass_and_has_no_value() -> None:
    """It is a key more of each head, without a place, whose value is zero."""
    of, sinks = inputs(), torch.randn(6, dtype=torch.float64, requires_grad=True)
    scores = of[0] @ of[1].repeat_interleave(2, 1).mT * 0.4
    scores = scores.masked_fill(~PLAN.mask(None), -torch.inf)
    weights = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, 6, 32, 1)], -1).softmax(-1)[..., :-1]
    wanted = weights @ of[2].repeat_interleave(2, 1)
    for settings in (Settings(0.4), Settings(0.4, cap=1e9)):  # the fused kernel, and plain products
        out = tree_attention(*of, PLAN, settings, sinks)
        torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-7)
        slope = torch.randn_like(wanted)
        ours, theirs = (torch.autograd.grad(x, [*of, sinks], slope, retain_graph=True) for x in (out, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
