"""Merging and unmerging over layer kinds and dtypes: the branch's output, and the bits of before. No scale is 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

import deltaw
from deltaw import LoRA, attach, merge, unmerge, use
from deltaw.errors import MergeError
from deltaw.layers.ops.merging import Block, Change, Product
from deltaw.layers.ops.undo import Copy, Correction
from deltaw.methods.plan import Plan
from deltaw.methods.updates.lowrank import LowRank
from deltaw.model.ends import teach
from deltaw.model.merging.merge import settle
from deltaw.model.record import record_of
from deltaw.model.summary import updates
from tests.conftest import bits, fill, tiny_llama

METHOD = LoRA(rank=4, alpha=10)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_computes_what_the_branch_did_and_unmerging_is_exact(
    tiny: Any, ids: torch.Tensor, dtype: torch.dtype
) -> None:
    tiny.to(dtype)
    before, base = bits(tiny), tiny(ids).logits
    fill(attach(tiny, METHOD))
    branch = tiny(ids).logits
    report = merge(tiny)
    merged = tiny(ids).logits
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(merged, branch, rtol=tolerance, atol=tolerance)
    assert (branch - base).abs().max().item() > 10 * (merged - branch).abs().max().item()
    assert set(report.layers) == set(updates(tiny, "default"))
    assert 0 < report.relative < 100 and 0.9 < report.survived < 1.1 and report.largest_change > 0
    unmerge(tiny)
    assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())
    assert torch.equal(tiny(ids).logits, branch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_is_exact_after_many_merges_and_switches(tiny: Any, dtype: torch.dtype) -> None:
    tiny.to(dtype)
    before = bits(tiny)
    fill(attach(tiny, METHOD, name="a"), seed=1)
    fill(attach(tiny, LoRA(rank=2, alpha=7, targets="mlp"), name="b"), seed=2)
    for chosen in ({"name": "a"}, {"name": "b"}, {"weights": {"a": 0.3, "b": -1.7}}, {}, {"weights": {"b": 2.0}}):
        merge(tiny, **chosen)
        unmerge(tiny)
        use(tiny, "a")
        assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())


def test_a_weighted_merge_is_the_sum_of_the_deltas(tiny: Any) -> None:
    fill(attach(tiny, METHOD, name="a"), seed=1)
    fill(attach(tiny, LoRA(rank=2, alpha=7), name="b"), seed=2)
    layer = next(iter(updates(tiny, "a")))
    update = updates(tiny, "a")[layer]
    W0 = update.W0(tiny.get_submodule(layer)).clone()
    expected = W0 + 0.3 * deltaw.delta(tiny, layer, "a") - 1.7 * deltaw.delta(tiny, layer, "b")
    merge(tiny, weights={"a": 0.3, "b": -1.7})
    torch.testing.assert_close(update.W0(tiny.get_submodule(layer)), expected)


def test_one_adapter_at_weight_one_is_the_plain_merge(tiny: Any) -> None:
    fill(attach(tiny, METHOD))
    merge(tiny)
    plain = bits(tiny)
    unmerge(tiny)
    merge(tiny, weights={"default": 1.0})
    assert all(torch.equal(bits(tiny)[n], v) for n, v in plain.items())


def test_delta_is_what_a_merge_adds(tiny: Any) -> None:
    fill(attach(tiny, METHOD))
    for layer, update in updates(tiny).items():
        W0 = update.W0(tiny.get_submodule(layer)).detach().clone()
        dW = deltaw.delta(tiny, layer)
        assert dW.shape == W0.shape
        torch.testing.assert_close(dW, (10 / 4) * update.B.detach() @ update.A.detach())
        merge(tiny)
        assert torch.equal(update.W0(tiny.get_submodule(layer)), W0 + dW)
        unmerge(tiny)


def test_settle_makes_a_merge_final(tiny: Any, ids: torch.Tensor) -> None:
    plain = [(n, type(m)) for n, m in tiny.named_modules()]
    fill(attach(tiny, METHOD))
    fill(attach(tiny, METHOD, name="other"), seed=9)
    merge(tiny, "default")
    merged = bits(tiny)
    settle(tiny)
    assert all(torch.equal(bits(tiny)[n], v) for n, v in merged.items())
    assert [(n, type(m)) for n, m in tiny.named_modules()] == plain
    assert deltaw.adapters(tiny) == ()


@pytest.mark.parametrize("keep", ["copy", "correction"])
def test_each_merged_adapter_can_be_taken_out_alone(tiny: Any, keep: Any) -> None:
    before = bits(tiny)
    for i, name in enumerate("abc"):
        fill(attach(tiny, METHOD, name=name), name, seed=i)
    merge(tiny, weights={"a": 0.5, "c": -2.0})
    expected = bits(tiny)
    unmerge(tiny)
    merge(tiny, weights={"a": 0.5, "b": 1.5, "c": -2.0}, keep=keep)
    with pytest.raises(MergeError, match="'d' is not merged; Adapters 'a', 'b', 'c' are"):
        unmerge(tiny, "d")
    unmerge(tiny, "b")
    assert all(torch.equal(bits(tiny)[n], v) for n, v in expected.items())
    unmerge(tiny, "a")
    unmerge(tiny, "c")
    assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())
    assert deltaw.adapters(tiny).active == "c"


class Interrupted(NamedTuple):
    """A change that is interrupted from the keyboard after its first block."""

    product: Product

    def blocks(self, W0: torch.Tensor) -> Iterator[Block]:
        yield next(self.product.blocks(W0))
        raise KeyboardInterrupt


class Interrupting(LowRank):
    """A low-rank update whose merges are interrupted while it is told so."""

    interrupts = False

    def changes(self, layer: Any) -> dict[str, Change]:
        return {"weight": Interrupted(self.product)} if self.interrupts else super().changes(layer)


class WithInterrupting(LoRA):
    """A LoRA whose last layer has an Interrupting."""

    def plan(self, model: torch.nn.Module) -> Plan:
        plan = super().plan(model)
        *_, last = plan.updates
        update = plan.updates[last]
        assert isinstance(update, LowRank)
        return Plan({**plan.updates, last: Interrupting(update.kind, update.A, update.B, update.scale)}, plan.left_out)


@pytest.mark.parametrize("keep", ["copy", "correction"])
def test_a_merge_that_is_interrupted_leaves_the_model(tiny: Any, keep: Any) -> None:
    before = bits(tiny)
    fill(attach(tiny, WithInterrupting(rank=4, alpha=10)))
    *_, last = updates(tiny).values()
    vars(last)["interrupts"] = True
    with pytest.raises(KeyboardInterrupt):
        merge(tiny, keep=keep)
    assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())
    assert deltaw.adapters(tiny).active == "default"


@pytest.mark.parametrize("change", ["not finite", "interrupted"])
@pytest.mark.parametrize("keep", ["copy", "correction"])
def test_one_of_several_is_taken_out_whole_or_not_at_all(change: str, keep: Any) -> None:
    torch.manual_seed(4)
    model = tiny_llama(tied=False).eval()
    before = bits(model)
    fill(attach(model, METHOD, name="a"), "a", seed=1)
    fill(attach(model, WithInterrupting(rank=2, alpha=7, targets="mlp"), name="b"), "b", seed=2)
    merge(model, weights={"a": 1.5, "b": -0.5}, keep=keep)
    now = bits(model)
    *_, last = updates(model, "b").values()
    good = last.B.detach().clone()
    if change == "not finite":
        with torch.no_grad():
            last.B[0, 0] = float("nan")
    vars(last)["interrupts"] = change == "interrupted"
    with pytest.raises(MergeError if change == "not finite" else KeyboardInterrupt):
        unmerge(model, "a")
    assert all(torch.equal(bits(model)[n], v) for n, v in now.items())
    assert deltaw.adapters(model).active is None
    with torch.no_grad():
        last.B.copy_(good)
    vars(last)["interrupts"] = False
    unmerge(model, "a")
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


def test_a_float64_base_is_merged_in_float64(tiny: Any, ids: torch.Tensor) -> None:
    tiny.double()
    before = bits(tiny)
    for seed, name in enumerate("ab"):
        fill(attach(tiny, METHOD, name=name), name, seed=seed)
    layer, update = next(iter(updates(tiny, "a").items()))
    W0 = update.W0(tiny.get_submodule(layer)).detach().clone()
    for chosen, factors in (({"name": "a"}, {"a": 1.0}), ({"weights": {"a": 0.3, "b": -1.7}}, {"a": 0.3, "b": -1.7})):
        for keep in ("copy", "correction"):
            merge(tiny, keep=keep, **chosen)
            expected = W0.clone()
            for name, weight in factors.items():
                own = updates(tiny, name)[layer]
                expected += weight * (10 / 4) * own.B.detach().double() @ own.A.detach().double()
            torch.testing.assert_close(update.W0(tiny.get_submodule(layer)).detach(), expected, rtol=1e-13, atol=1e-13)
            unmerge(tiny)
            assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())
    assert deltaw.delta(tiny, layer, "a").dtype == torch.float64


@pytest.mark.parametrize("keep", ["copy", "correction"])
def test_a_model_that_was_made_under_inference_mode_is_merged_outside_of_it(keep: Any) -> None:
    with torch.inference_mode():
        torch.manual_seed(1)
        model = tiny_llama().eval()
        before = bits(model)
        fill(attach(model, LoRA(rank=2, alpha=5)))
    merge(model, keep=keep)
    assert any(not torch.equal(bits(model)[n], v) for n, v in before.items())
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


@pytest.mark.parametrize(("weight", "stops"), [(1.0, [2, 7]), (0.25, [2, 7]), (0.0, 2), (-0.5, 2), (-1.0, 2)])
def test_a_merged_model_stops_where_what_was_added_to_it_was_taught_to(weight: float, stops: Any) -> None:
    model = fill(attach(tiny_llama().eval(), METHOD))
    teach(model, "default", [7])
    merge(model, weights={"default": weight}, allow_unchanged=weight == 0.0)
    assert model.generation_config.eos_token_id == stops
    unmerge(model)
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(("keep", "kind"), [("copy", Copy), ("correction", Correction)])
def test_what_is_kept_of_the_others_is_of_the_same_kind(keep: Any, kind: type) -> None:
    model = tiny_llama(tied=False).eval()
    for name, targets in (("a", "attention"), ("b", "mlp")):
        fill(attach(model, LoRA(rank=2, alpha=5, targets=targets), name=name), name)
    merge(model, weights={"a": 1.0, "b": 1.0}, keep=keep)
    unmerge(model, "a")
    originals = record_of(model).originals
    assert originals and all(isinstance(kept.original, kind) and "mlp" in name for name, kept in originals.items())
    merged_by_one = bits(model)
    unmerge(model)
    merge(model, "b")
    assert all(torch.equal(bits(model)[n], v) for n, v in merged_by_one.items())


def test_adapters_that_stay_merged_may_change_nothing() -> None:
    model = fill(attach(tiny_llama().eval(), METHOD, name="a"), "a")
    before = bits(model)
    attach(model, METHOD, name="untrained")
    merge(model, weights={"a": 1.0, "untrained": 1.0})
    unmerge(model, "a")
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())
    assert list(record_of(model).merged) == ["untrained"]
