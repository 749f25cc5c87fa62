import pytest
import torch
from torch import nn

import deltaw
from deltaw.layers.tree import evaluating, is_finite, not_finite_in, to_train
from tests.conftest import tiny_llama


def mixed() -> nn.Module:
    """In training mode but for one module, as a user leaves a frozen batch norm."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())).train()
    model[1][0].eval()
    return model


def test_each_module_gets_its_own_mode_back() -> None:
    model = mixed()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before


def test_after_an_error_too() -> None:
    model = mixed()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert model.training and not model[1][0].training


def test_norms_with_running_statistics_stay_as_they_are() -> None:
    model = nn.Sequential(
        nn.Dropout(), nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2)
    )
    to_train(model.eval())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]


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
