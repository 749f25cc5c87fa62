"""The report of a merge, and merges that are none: not finite, or without effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltaw
from deltaw import LoRA, attach, detach, merge, unmerge
from deltaw.errors import MergeError
from deltaw.model.merging.merge import preview
from deltaw.model.summary import updates
from tests.conftest import assert_same, bits, fill, snapshot, tiny_gpt2, tiny_llama

METHOD = LoRA(rank=4, alpha=10)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_preview_says_what_the_merge_then_does_and_changes_nothing(tiny: Any, dtype: torch.dtype) -> None:
    fill(attach(tiny.to(dtype), METHOD))
    before = snapshot(tiny)
    foreseen = preview(tiny)
    assert_same(tiny, before)
    assert merge(tiny).layers == foreseen.layers
    with pytest.raises(MergeError, match="merged already"):
        preview(tiny)


def test_a_reports_rows_are_families_of_layers_then_all(tiny: Any) -> None:
    report = merge(fill(attach(tiny, METHOD)))
    *families, last = report.rows()
    assert sum(row["count"] for row in families) == last["count"] == len(report.layers)
    assert all("*" in row["layers"] and row["count"] == 2 for row in families) and last["layers"] == "all"
    assert last["relative"] == report.relative and last["largest_change"] == max(r["largest_change"] for r in families)


def test_the_report_counts_the_bytes_that_are_kept(ids: torch.Tensor) -> None:
    model = fill(attach(tiny_llama().eval(), LoRA(rank=2, alpha=5, targets="qv")))
    targeted = sum(4 * model.get_submodule(name).weight.numel() for name in updates(model))
    assert merge(model).extra_memory == targeted
    unmerge(model)
    detach(model)
    fill(attach(model, LoRA(rank=2, alpha=5, targets=["lm_head"])))
    vocabulary = 4 * model.lm_head.weight.numel()
    assert merge(model, untie=True).extra_memory == 2 * vocabulary  # the copy, and the weight that the head has alone


def test_merging_what_changes_nothing_is_an_error_and_leaves_the_model(tiny: Any) -> None:
    before = bits(tiny)
    attach(tiny, METHOD)
    with pytest.raises(
        MergeError, match=r"would come out of the merge unchanged(.|\n)*ΔW is zero \(was it trained\?\)"
    ):
        merge(tiny)
    tiny.to(torch.bfloat16)
    fill(tiny, size=1e-5)
    with pytest.raises(MergeError, match="rounds ΔW away"):
        merge(tiny)
    assert deltaw.adapters(tiny).active == "default"
    tiny.float()
    detach(tiny)
    assert bits(tiny).keys() == before.keys()


def test_scaled_zeros_are_no_merge_that_failed(ids: torch.Tensor) -> None:
    """A GPT-2 whose biases are zero, as they start: (IA)³ scales its weights and them."""
    torch.manual_seed(1)
    model = fill(deltaw.attach(tiny_gpt2().eval(), deltaw.IA3()))
    before, expected = bits(model), model(ids).logits
    report = deltaw.merge(model)
    assert report.layers["transformer.h.0.attn.c_attn.bias"].changed == 0.0
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
    deltaw.unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_merge_that_is_not_finite_is_an_error_and_leaves_the_model(tiny: Any, value: float) -> None:
    fill(attach(tiny.to(torch.float16), METHOD))
    B = next(iter(updates(tiny).values())).B
    before, good = snapshot(tiny), B.detach().clone()
    with torch.no_grad():
        B[0, 0] = value
    with pytest.raises(MergeError, match=r"1 of .* not be finite"):
        merge(tiny)
    with torch.no_grad():
        B.copy_(good)
    with pytest.raises(MergeError, match="not be finite"):
        merge(tiny, weights={"default": value})
    assert_same(tiny, before)
