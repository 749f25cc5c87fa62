"""Layers that read the same tensor are computed as one, and as themselves wherever they turn out not to read it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw import LoRA, attach
from deltaw.model.summary import parameters
from tests.conftest import fill, tiny_llama
from tests.training.test_flat import MODELS, Reads, flat_of, measure, prepared


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("bert", [["query", "key", "value"], ["dense"], ["dense"], ["dense"]]),
        ("gptj", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc_in"], ["fc_out"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
    ],
)
def test_layers_that_read_the_same_tensor_are_found(name: str, expected: list[list[str]], ids: Tensor) -> None:
    model = prepared(MODELS[name])
    groups = [[n.rsplit(".", 1)[-1] for n in group] for group in flat_of(model, ids).groups]
    assert groups[:4] == expected and len(groups) == len([g for g in groups if g]) >= 8


def test_they_are_computed_by_one_operation(ids: Tensor) -> None:
    model = prepared(lambda: tiny_llama(layers=1))
    by: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            part = name.rpartition(".")[2]
            layer.register_forward_hook(lambda module, x, out, part=part: by.update({part: out.grad_fn}))
    with flat_of(model, ids):
        measure(model, ids)
    assert by["q_proj"] is by["k_proj"] is by["v_proj"] and by["gate_proj"] is by["up_proj"]
    assert len({*map(id, by.values())}) == 4


def changed(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x + 1


@pytest.mark.parametrize("use", [changed, lambda x: (x, None)])
def test_a_layer_that_is_called_with_another_tensor_later_is_computed_with_that(use: Any) -> None:
    torch.manual_seed(0)
    model = Reads().double()
    fill(attach(model, LoRA(rank=2, alpha=5)))
    x = torch.randn(5, 4, dtype=torch.float64)
    with flat_of(model, x) as flat:
        assert flat.groups == [["one", "two"]]
        model.train()
        model(x).sum().backward()  # as in the pass in which they were seen
        model.use = use
        for _ in range(2):
            flat.add_gradients()
            flat.zero_gradients()
            found = model(x)
            found.sum().backward()
        flat.add_gradients()
        gradients = [p.grad.clone() for p in parameters(model)]
    expected = model(x)
    torch.testing.assert_close(found, expected)
    plain = torch.autograd.grad(expected.sum(), parameters(model), allow_unused=True)
    for ours, theirs in zip(gradients, plain, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_a_tensor_changed_in_place_between_two_layers_is_another_one() -> None:
    class InPlace(Reads):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            return self.one(x) * self.two(x.add_(1) if self.change else x)

    model = InPlace().double()
    fill(attach(model, LoRA(rank=2, alpha=5)))
    x = torch.randn(5, 4, dtype=torch.float64)
    model.change = False
    with torch.no_grad(), flat_of(model, x) as flat:
        assert flat.groups == [["one", "two"]]
        model.train().change = True
        found = model(x), model(x)
    with torch.no_grad():
        for out in found:
            torch.testing.assert_close(out, model(x))


def test_dropout_of_each_layer_is_its_own(ids: Tensor) -> None:
    model = prepared(tiny_llama, dropout=0.5)
    flat = flat_of(model, ids)
    assert all(len(group) == 1 for group in flat.groups)
    torch.manual_seed(3)
    expected = measure(model, ids)
    with flat:
        torch.manual_seed(3)
        torch.testing.assert_close(measure(model, ids), expected)
