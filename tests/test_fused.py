"""The fused function against plain operations: values, gradients, dtypes, autocast, odd inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.fused import lowrank_linear, reference

SCALE = 1.75


def tensors(dtype: torch.dtype = torch.float64, *, bias: bool = True, transposed: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    W0 = torch.randn(7, 5, dtype=dtype)
    return {
        "x": torch.randn(2, 3, 5, dtype=dtype, requires_grad=True),
        "W0": W0.t().contiguous().t() if transposed else W0,
        "bias": torch.randn(7, dtype=dtype) if bias else None,
        "A": torch.randn(3, 5, dtype=dtype, requires_grad=True),
        "B": torch.randn(7, 3, dtype=dtype, requires_grad=True),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_gradcheck(bias: bool, transposed: bool, training: bool) -> None:
    t = tensors(bias=bias, transposed=transposed)
    assert torch.autograd.gradcheck(
        lambda x, A, B: lowrank_linear(x, t["W0"], t["bias"], A, B, SCALE, training=training), (t["x"], t["A"], t["B"])
    )


@pytest.mark.parametrize("frozen", [(), ("x",), ("A",), ("B",), ("A", "B"), ("x", "B")])
def test_gradients_are_the_references_whatever_is_frozen(frozen: tuple[str, ...]) -> None:
    t = tensors()
    for name in frozen:
        t[name].requires_grad_(False)
    live = [t[n] for n in ("x", "A", "B") if n not in frozen]
    g = torch.randn(2, 3, 7, dtype=torch.float64)
    fused = lowrank_linear(**t, scale=SCALE)
    plain = reference(**t, scale=SCALE)
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(torch.autograd.grad(fused, live, g), torch.autograd.grad(plain, live, g), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_non_contiguous_and_expanded_inputs_and_gradients() -> None:
    t = tensors()
    for x in (
        torch.randn(5, 4, 6, dtype=torch.float64).permute(2, 1, 0),
        torch.randn(1, 1, 5, dtype=torch.float64).expand(2, 4, 5),
    ):
        t["x"] = x.detach().requires_grad_()
        grads = [
            torch.autograd.grad(f(**t, scale=SCALE).transpose(0, 1).sum(-1).pow(2).sum(), [t["x"], t["A"], t["B"]])
            for f in (lowrank_linear, reference)
        ]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_with_fp32_factors(dtype: torch.dtype) -> None:
    t = tensors(dtype)
    t["A"], t["B"] = (t[n].detach().float().requires_grad_() for n in "AB")
    out = lowrank_linear(**t, scale=SCALE)
    assert out.dtype == dtype
    dA, dB = torch.autograd.grad(out.sum(), [t["A"], t["B"]])
    assert dA.dtype == dB.dtype == torch.float32
    torch.testing.assert_close(out, reference(**t, scale=SCALE), rtol=0.05, atol=0.05)


def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_theirs() -> None:
    t = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lowrank_linear(**t, scale=SCALE)
        plain = reference(**t, scale=SCALE)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain.float(), rtol=0.05, atol=0.1)
    for gradient in torch.autograd.grad(out.float().sum(), [t["x"], t["A"], t["B"]]):
        assert gradient.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    t = tensors(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(lowrank_linear(**t, scale=SCALE), reference(**t, scale=SCALE))


def test_an_unfrozen_weight_gets_its_gradient() -> None:
    t = tensors()
    t["W0"] = t["W0"].clone().requires_grad_()
    ours = torch.autograd.grad(lowrank_linear(**t, scale=SCALE).pow(2).sum(), t["W0"])[0]
    theirs = torch.autograd.grad(reference(**t, scale=SCALE).pow(2).sum(), t["W0"])[0]
    torch.testing.assert_close(ours, theirs)


def test_dropout_is_on_the_branchs_input_only() -> None:
    t = tensors()
    base: Tensor = torch.nn.functional.linear(t["x"], t["W0"], t["bias"])
    torch.manual_seed(5)
    out = lowrank_linear(**t, scale=SCALE, dropout=0.5)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(t["x"], 0.5)
    torch.testing.assert_close(out, base + SCALE * (dropped @ t["A"].T @ t["B"].T))


def test_saves_x_and_ax_but_never_the_branchs_output() -> None:
    x, W0 = torch.randn(50, 16), torch.randn(24, 16)
    A, B = torch.randn(2, 16, requires_grad=True), torch.randn(24, 2, requires_grad=True)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        lowrank_linear(x, W0, None, A, B, SCALE)
    assert sorted(saved) == sorted([(50, 16), (24, 16), (2, 16), (24, 2), (50, 2)])
