"""Rows with adapters of their own, in the cases between two options: dropout, training and evaluation, dtypes, ranks, biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw import DoRA, LoRA, attach, route, rows, using
from deltaw.attached import updates
from deltaw.errors import AdapterError
from tests.conftest import fill
from tests.test_weights import model_of


class Layer(nn.Module):
    """One dense layer, non-square, whose rows are easy to tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense(x)
        return out


def layer_with(**adapters: LoRA) -> Any:
    torch.manual_seed(0)
    model = Layer()
    for seed, (name, method) in enumerate(adapters.items()):
        fill(attach(model, method, name=name), name, seed=seed)
    return model.eval()


def lora(rank: int = 3, **settings: Any) -> LoRA:
    return LoRA(rank=rank, alpha=1.5 * rank, targets=["dense"], **settings)


def alone(model: Any, x: Tensor, names: list[str | None]) -> Tensor:
    rows = []
    for row, name in zip(x, names, strict=True):
        with using(model, name):
            rows.append(model(row[None]))
    return torch.cat(rows)


def routed(model: Any, x: Tensor, names: list[str | None]) -> Tensor:
    with route(model, names):
        out: Tensor = model(x)
    return out


X = torch.randn(4, 6, 40, generator=torch.Generator().manual_seed(1))
NAMES: list[str | None] = ["b", "a", None, "b"]


def test_dropout_is_on_in_training_alone_and_each_adapters_own() -> None:
    model = layer_with(a=lora(dropout=0.5), b=lora())
    torch.testing.assert_close(routed(model, X, NAMES), alone(model, X, NAMES), atol=1e-5, rtol=1e-5)
    torch.manual_seed(3)
    model.train()
    one, other = routed(model, X, NAMES), routed(model, X, NAMES)
    expected = alone(model.eval(), X, NAMES)
    for row, name in enumerate(NAMES):
        if name == "a":
            assert (one[row] - other[row]).abs().max() > 1e-2 and (one[row] - expected[row]).abs().max() > 1e-2
        else:
            torch.testing.assert_close(one[row], expected[row], atol=1e-5, rtol=1e-5)
    model.train()
    with torch.no_grad():
        mean = torch.stack([routed(model, X, NAMES) for _ in range(600)]).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.3, rtol=0.1)
    torch.testing.assert_close(routed(model.eval(), X, NAMES), expected, atol=1e-5, rtol=1e-5)


def test_one_adapters_dropout_does_not_reach_anothers_stack() -> None:
    """Adapters of one rank and dtype, for one row each, of which the second drops nothing out."""
    model = layer_with(a=lora(dropout=0.4), b=lora(dropout=0.0), c=lora(dropout=0.4)).train()
    names: list[str | None] = ["a", "b", "c", None]
    outputs = [routed(model, X, names) for _ in range(2)]
    same = [(outputs[0][row] - outputs[1][row]).abs().max() < 1e-6 for row in range(4)]
    assert same == [False, True, False, True]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_adapters_of_two_dtypes_are_each_computed_in_their_own(dtypes: tuple[Any, Any], base: torch.dtype) -> None:
    model = layer_with(a=lora(), b=lora()).to(base)
    for name, dtype in zip("ab", dtypes, strict=True):
        for update in updates(model, name).values():
            update.to(dtype)
    names: list[str | None] = ["a", "b", "a", "b"]
    out = routed(model, X.to(base), names)
    assert out.dtype == base
    loose = torch.bfloat16 in (*dtypes, base)
    torch.testing.assert_close(out, alone(model, X.to(base), names), atol=5e-2 if loose else 1e-5, rtol=2e-2)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["a", "b"])
def test_an_adapter_in_fewer_bits_takes_none_from_another(other: torch.dtype, name: str) -> None:
    """Both of one rank, for as many rows each."""
    model = layer_with(a=lora(), b=lora())
    names: list[str | None] = ["a", "b", "a", "b"]
    expected = alone(model, X, names)
    for update in updates(model, name).values():
        update.to(other)
    exact = [row for row, own in enumerate(names) if own != name]
    torch.testing.assert_close(routed(model, X, names)[exact], expected[exact], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("stored", "layer", "working"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_a_stack_is_in_the_narrower_dtype_that_has_products(
    stored: torch.dtype, layer: torch.dtype, working: torch.dtype
) -> None:
    model = layer_with(a=lora())
    (update,) = updates(model, "a").values()
    stack = rows._stack([update.to(stored)], layer)
    assert stack.A.dtype == stack.B.dtype == working


def test_a_change_of_mode_dtype_or_device_memory_is_seen_by_the_next_pass() -> None:
    model = layer_with(a=lora(dropout=0.5), b=lora(2))
    names: list[str | None] = ["a", "b", None, "a"]
    with torch.no_grad():
        first = routed(model, X, names)
        assert (routed(model.train(), X, names) - first).abs().max() > 1e-2
        torch.testing.assert_close(routed(model.eval(), X, names), first)
        double = routed(model.double(), X.double(), names)
        torch.testing.assert_close(double.float(), first, atol=1e-4, rtol=1e-4)
        updates(model, "b")["dense"].B.data.mul_(3.0)
        torch.testing.assert_close(
            routed(model, X.double(), names), alone(model, X.double(), names), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(routed(model.float(), X, names)[2], first[2], atol=1e-5, rtol=1e-5)


def test_several_ranks_and_numbers_of_rows_in_one_batch_with_gradients() -> None:
    model = layer_with(a=lora(1), b=lora(3), c=lora(3), d=lora(5))
    names: list[str | None] = ["c", "d", None, "a", "b", "c", "a", "b"]
    x = torch.randn(8, 2, 40)
    out, expected = routed(model, x, names), alone(model, x, names)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for name in "abcd":
        update = updates(model, name)["dense"]
        tensors = [update.A.requires_grad_(), update.B.requires_grad_()]
        for ours, theirs in zip(
            torch.autograd.grad(routed(model, x, names).square().sum(), tensors),
            torch.autograd.grad(alone(model, x, names).square().sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_a_batch_of_another_number_of_rows_is_an_error_with_both_numbers() -> None:
    model = layer_with(a=lora(), b=lora())
    with pytest.raises(AdapterError, match=r"4.*\[3, 6, 40\]|3.*4"), route(model, NAMES):
        model(X[:3])


def test_adapters_that_cannot_be_stacked_compute_their_own_rows() -> None:
    dora = DoRA(rank=3, alpha=4.5, targets=["dense"])
    model = layer_with(a=dora, b=lora(2), c=dora)
    names: list[str | None] = ["c", "b", None, "a", "a"]
    x = torch.randn(5, 6, 40)
    torch.testing.assert_close(routed(model, x, names), alone(model, x, names), atol=1e-5, rtol=1e-5)
    for one in (["c", None, "a", "c", None], ["a", "a", None, None, None]):
        torch.testing.assert_close(routed(model, x, one), alone(model, x, one), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "GPT-OSS"])
@torch.no_grad()
def test_experts_compute_the_tokens_of_each_rows_own_adapter(name: str) -> None:
    model = model_of(name)
    for seed, adapter in enumerate("ab"):
        fill(attach(model, LoRA(rank=2 + seed, alpha=5), name=adapter), adapter, seed=seed)
    ids = torch.randint(4, 90, (5, 7), generator=torch.Generator().manual_seed(1))
    names = ["b", None, "a", "b", None]
    with route(model, names):
        together = model(ids).logits
    for row, adapter in enumerate(names):
        with using(model, adapter):
            torch.testing.assert_close(together[row], model(ids[row : row + 1]).logits[0], atol=1e-4, rtol=1e-4)
