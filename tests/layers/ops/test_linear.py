"""The fused function against plain operations: values, gradients, dtypes, autocast, odd inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.layers.ops import linear
from deltaw.layers.ops.linear import lowrank_linear, lowrank_linears, reference

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


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_may_change_the_output_in_place(bias: bool) -> None:
    """As RoCBert does: what comes after the change has its gradients, as with a plain layer."""
    t = tensors(bias=bias)
    (A2, B2) = (t["A"].detach().clone().requires_grad_(), t["B"].detach().clone().requires_grad_())
    grads = []
    for layer in (
        lambda: lowrank_linear(**t, scale=SCALE),
        lambda: lowrank_linears(t["x"], [t["W0"]], [t["bias"]], t["A"] * SCALE, [t["B"]])[0],
        lambda: lowrank_linears(t["x"], [t["W0"]] * 2, [t["bias"]] * 2, torch.cat([t["A"] * SCALE, A2]), [t["B"], B2])[
            0
        ],
        lambda: reference(**t, scale=SCALE),
    ):
        out = layer()
        out += 1.0
        out[:, 0] *= 2.0
        grads.append(torch.autograd.grad(out.pow(2).sum(), [t["x"], t["A"], t["B"]]))
    for ours in grads[:-1]:
        torch.testing.assert_close(ours, grads[-1])


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


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    t = tensors()
    (gradient,) = torch.autograd.grad(lowrank_linear(**t, scale=SCALE).pow(2).sum(), t["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_unfrozen_weight_gets_its_gradient() -> None:
    t = tensors()
    t["W0"] = t["W0"].clone().requires_grad_()
    ours = torch.autograd.grad(lowrank_linear(**t, scale=SCALE).pow(2).sum(), t["W0"])[0]
    theirs = torch.autograd.grad(reference(**t, scale=SCALE).pow(2).sum(), t["W0"])[0]
    torch.testing.assert_close(ours, theirs)
    t = tensors()
    t["bias"].requires_grad_()
    (ours,) = torch.autograd.grad(lowrank_linear(**t, scale=SCALE).sum(), t["bias"])
    torch.testing.assert_close(ours, torch.full_like(ours, 6.0))


def test_dropout_is_on_the_branchs_input_only_and_its_mask_is_made_again_for_the_gradients() -> None:
    for x in (torch.randn(2, 3, 5), torch.randn(5, 3, 2).permute(2, 1, 0)):
        t = tensors()
        t["x"] = x.double().requires_grad_()
        torch.manual_seed(5)
        seed = linear._seed()
        plain = reference(**t, scale=SCALE, dropout=0.5, seed=seed)
        torch.manual_seed(5)
        out = lowrank_linear(**t, scale=SCALE, dropout=0.5)
        torch.testing.assert_close(out, plain)
        inputs = [t["x"], t["A"], t["B"]]
        g = torch.randn_like(out)
        for ours, theirs in zip(
            torch.autograd.grad(out, inputs, g), torch.autograd.grad(plain, inputs, g), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_dropout_keeps_the_expectation_and_is_off_outside_training() -> None:
    x = torch.ones(400, 8)
    ones = torch.ones(1, 8), torch.ones(1, 1)
    out = lowrank_linear(x, torch.zeros(1, 8), None, *ones, SCALE, dropout=0.25)
    assert out.unique().numel() > 3 and abs(float(out.mean()) / (8 * SCALE) - 1) < 0.05
    out = lowrank_linear(x, torch.zeros(1, 8), None, *ones, SCALE, dropout=0.25, training=False)
    assert out.unique().tolist() == [8 * SCALE]


def stacked(*, bias: bool) -> tuple[Any, ...]:
    """x, and W0, bias, A and B of three layers of different widths and ranks that read it."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    sizes = ((7, 2), (4, 3), (6, 1))
    W0s = [torch.randn(d, 5, dtype=torch.float64) for d, _ in sizes]
    biases = [torch.randn(d, dtype=torch.float64) if bias else None for d, _ in sizes]
    A = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    Bs = [torch.randn(r, d, dtype=torch.float64).t().requires_grad_() for d, r in sizes]  # strides of either kind
    return x, W0s, biases, A, Bs


@pytest.mark.parametrize("bias", [True, False])
def test_layers_together_are_each_layer_alone(bias: bool) -> None:
    x, W0s, biases, A, Bs = stacked(bias=bias)
    together = lowrank_linears(x, W0s, biases, A, Bs)
    parts = A.split([B.shape[1] for B in Bs])
    alone = [reference(x, *layer, 1.0) for layer in zip(W0s, biases, parts, Bs, strict=True)]
    gs = [torch.randn_like(out) for out in alone]
    torch.testing.assert_close(list(together), alone)
    inputs = [x, A, *Bs]
    for ours, theirs in zip(
        torch.autograd.grad(together, inputs, gs), torch.autograd.grad(alone, inputs, gs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda x, A, *Bs: lowrank_linears(x, W0s, biases, A, Bs), (x, A, *Bs))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)])
@pytest.mark.parametrize("x_frozen", [True, False])
def test_an_output_that_nothing_is_made_of_costs_no_gradient(used: tuple[int, ...], x_frozen: bool) -> None:
    x, W0s, biases, A, Bs = stacked(bias=True)
    x = x.detach() if x_frozen else x
    inputs = [A, *(Bs[i] for i in used)] + ([] if x_frozen else [x])
    together = lowrank_linears(x, W0s, biases, A, Bs)
    parts = A.split([B.shape[1] for B in Bs])
    alone = [reference(x, *layer, 1.0) for layer in zip(W0s, biases, parts, Bs, strict=True)]
    for ours, theirs in zip(
        torch.autograd.grad(sum(together[i].pow(2).sum() for i in used), inputs),
        torch.autograd.grad(sum(alone[i].pow(2).sum() for i in used), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    lowrank_linears(x, W0s, biases, A, Bs)[used[0]].sum().backward()
    assert [B.grad is not None for B in Bs] == [i == used[0] for i in range(3)]


class _Doubled:
    """Products of other weights than those that the layers have."""

    def __init__(self, W0s: list[Tensor]) -> None:
        self.W0 = 2 * torch.cat(W0s)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W0.t()

    def backward(self, g: Tensor) -> Tensor:
        return g @ self.W0


@pytest.mark.parametrize("used", [(0, 1, 2), (2,), (0, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_products_of_frozen_weights_may_be_computed_elsewhere(used: tuple[int, ...], bias: bool) -> None:
    W0s = [torch.randn(d, 6, dtype=torch.float64) for d in (4, 3, 5)]
    biases = [torch.randn(len(W0), dtype=torch.float64) if bias else None for W0 in W0s]
    x, A = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 6), (6, 6)))
    Bs = [torch.randn(len(W0), 2, dtype=torch.float64, requires_grad=True) for W0 in W0s]
    leaves = [x, A, *(Bs[i] for i in used)]
    ours = lowrank_linears(x, W0s, biases, A, Bs, frozen=_Doubled(W0s))
    theirs = lowrank_linears(x, [2 * W0 for W0 in W0s], biases, A, Bs)
    torch.testing.assert_close(ours, theirs)
    sums = [sum(outputs[i].square().sum() for i in used) for outputs in (ours, theirs)]
    torch.testing.assert_close(*(torch.autograd.grad(total, leaves) for total in sums))


@pytest.mark.parametrize("live", ["xAB", "x", "A", "B"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_saves_x_and_ax_but_never_the_branchs_output_or_a_mask(dropout: float, live: str) -> None:
    x, W0 = torch.randn(50, 16, requires_grad="x" in live), torch.randn(24, 16)
    A, B = torch.randn(2, 16, requires_grad="A" in live), torch.randn(24, 2, requires_grad="B" in live)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        lowrank_linear(x, W0, None, A, B, SCALE, dropout)
    assert sorted(saved) == sorted([(50, 16), (24, 16), (2, 16), (24, 2), (50, 2)])


def test_nothing_is_saved_where_no_gradient_is_wanted() -> None:
    t = tensors()
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.no_grad():
        assert not lowrank_linear(**t, scale=SCALE).requires_grad
    assert not saved


def test_outside_training_fp32_is_rounded_as_the_formula_is_written() -> None:
    """PEFT's order, so that its logits come out the same; training rounds once, and so do narrower dtypes."""
    torch.manual_seed(1)
    x, W0, A, B = (torch.randn(*shape) for shape in ((40, 96), (72, 96), (8, 96), (72, 8)))
    for scale in (SCALE, 0.375, 1.0):
        written = torch.nn.functional.linear(x, W0) + (x @ A.t() @ B.t()) * scale
        assert torch.equal(lowrank_linear(x, W0, None, A, B, scale, training=False), written)
        torch.testing.assert_close(lowrank_linear(x, W0, None, A, B, scale), written, rtol=1e-4, atol=1e-4)
    assert not torch.equal(lowrank_linear(x, W0, None, A, B, SCALE), written)
    double = [t.double() for t in (x, W0, A, B)]
    written = torch.nn.functional.linear(*double[:2]) + (double[0] @ double[2].t() @ double[3].t()) * SCALE
    assert torch.equal(lowrank_linear(*double[:2], None, *double[2:], SCALE, training=False), written)
    assert torch.equal(lowrank_linears(x, [W0], [None], A, [B])[0], lowrank_linear(x, W0, None, A, B, 1.0))
    narrow = [t.bfloat16() for t in (x, W0)]
    once = lowrank_linear(*narrow, None, A, B, SCALE)
    assert torch.equal(lowrank_linear(*narrow, None, A, B, SCALE, training=False), once)
    assert not torch.equal(once, reference(*narrow, None, A, B, SCALE))


@pytest.mark.parametrize("scale", [0.375, 1.0, 2.0, 2.5, -0.5, 0.0])
def test_gradients_have_every_scale(scale: float) -> None:
    t = tensors()
    live = [t[name] for name in ("x", "A", "B")]
    g = torch.randn(2, 3, 7, dtype=torch.float64)
    ours = torch.autograd.grad(lowrank_linear(**t, scale=scale), live, g)
    torch.testing.assert_close(ours, torch.autograd.grad(reference(**t, scale=scale), live, g))


def test_a_mask_is_drawn_from_as_many_as_a_generator_has_and_none_without_dropout() -> None:
    torch.manual_seed(3)
    seeds = [linear._seed() for _ in range(64)]
    assert len(set(seeds)) == 64 and max(seeds).bit_length() > 56
    t, state = tensors(), torch.get_rng_state()
    lowrank_linear(**t, scale=SCALE)
    lowrank_linear(**t, scale=SCALE, dropout=0.5, training=False)
    assert torch.equal(torch.get_rng_state(), state)
    lowrank_linear(**t, scale=SCALE, dropout=0.5)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_plan_learns_shapes_and_what_is_saved_from_no_data(dtype: torch.dtype) -> None:
    x, W0, A, B = (torch.empty(*s, device="meta", dtype=dtype) for s in ((2, 3, 5), (7, 5), (3, 5), (7, 3)))
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lowrank_linear(x, W0, None, A.requires_grad_(), B.requires_grad_(), SCALE, training=False)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 7), dtype, "meta")
    assert torch.equal(torch.get_rng_state(), state)
    gradients = torch.autograd.grad(lowrank_linear(x, W0, None, A, B, SCALE, dropout=0.5).sum(), [A, B])
    assert [g.shape for g in gradients] == [A.shape, B.shape]


def test_a_seed_alone_drops_nothing() -> None:
    t = tensors()
    assert torch.equal(reference(**t, scale=SCALE, seed=3), reference(**t, scale=SCALE))
