"""NaN and infinity in a model's own tensors are named; masks and adapters are not blamed for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaw
from deltaw.layers.finite import is_finite, not_finite_in
from tests.conftest import tiny_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_one_entry_among_many_is_seen(dtype: torch.dtype) -> None:
    values = torch.ones(64, 64).to(dtype)
    assert is_finite(values)
    values[17, 3] = float("nan")
    assert not is_finite(values)


def test_finite_values_whose_sum_overflows_are_finite() -> None:
    assert is_finite(torch.full((10, 10), torch.finfo(torch.float16).max, dtype=torch.float16))
    assert is_finite(torch.arange(4)) and is_finite(torch.empty(3, device="meta"))


def test_a_models_own_tensors_are_named_and_no_adapters() -> None:
    model = deltaw.attach(tiny_llama(), deltaw.LoRA(rank=2, targets="q"))
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.mlp.up_proj.weight[0, 0] = float("inf")
        layer.self_attn.q_proj.weight[1, 1] = float("nan")
        deltaw.parameters(model)[0].fill_(float("nan"))
    assert not_finite_in(model) == ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]


def test_a_mask_of_infinities_that_no_checkpoint_has_is_left_out_and_a_tied_weight_is_named_once() -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.full((2, 2), float("-inf")), persistent=False)
    model.a, model.b = nn.Linear(2, 2), nn.Linear(2, 2)
    model.b.weight = model.a.weight
    with torch.no_grad():
        model.a.weight.fill_(float("nan"))
    assert not_finite_in(model) == ["a.weight"]
