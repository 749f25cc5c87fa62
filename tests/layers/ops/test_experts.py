"""Experts by the branch on their tokens: as the formed W0 + ΔW, in values and gradients, and nothing of its size is made."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltaw import LoRA, attach, combine, delta, parameters, route, using
from deltaw.errors import AdapterError
from deltaw.layers.ops.experts import Unformed, grouped_by_kernel
from deltaw.model.summary import updates
from tests.conftest import fill
from tests.methods.updates.test_weights import IDS, model_of, run

E, M, N, R, SCALE = 5, 12, 8, 3, 1.7
MIXTURES = ["Mixtral", "Qwen3-MoE", "GPT-OSS"]
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


def stack(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """W0 [E, M, N], left [E, M, R], right [E, R, N]; the factors take gradients."""
    g = torch.Generator().manual_seed(1)
    shapes = [(E, M, N), (E, M, R), (E, R, N)]
    W0, left, right = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return W0, left.requires_grad_(), right.requires_grad_()


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def by_expert(x: Tensor, W: Tensor) -> Tensor:
    """Each third of x through another expert, the fourth has no token."""
    return torch.cat([part @ W[e] for part, e in zip(x.split(4), (0, torch.tensor(4), 2), strict=True)])


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "linear of one expert": (lambda x, W: F.linear(x, W[torch.tensor(3)]), (4, N)),
    "linear with a bias": (lambda x, W: F.linear(x, W[-1], x.new_ones(M)), (2, 3, N)),
    "matmul": (by_expert, (12, M)),
    "matmul of the transposed": (lambda x, W: x @ W[1].T, (4, N)),
    "method": (lambda x, W: x.matmul(W.transpose(1, 2)[2]), (4, N)),
    "float32": (lambda x, W: x.float() @ W[1].float(), (4, M)),
    "bmm": (lambda x, W: torch.bmm(x, W), (E, 4, M)),
    "bmm of the transposed": (lambda x, W: torch.bmm(x, W.mT), (E, 4, N)),
    "stacked matmul": (lambda x, W: x @ W, (E, 4, M)),
    "gathered": (lambda x, W: torch.bmm(x[:, None], W[torch.tensor([3, 0, 3, 1])]).squeeze(1), (4, M)),
    "gathered before": (lambda x, W: torch.bmm(W[torch.tensor([3, 0, 3, 1])], x[..., None]).squeeze(-1), (4, N)),
    "some experts": (lambda x, W: torch.bmm(x, W[1:4]), (3, 4, M)),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_those_of_the_formed(product: str) -> None:
    compute, shape = PRODUCTS[product]
    W0, left, right = stack()
    x = tokens(*shape)
    loose = {"rtol": 1e-4, "atol": 1e-4} if product == "float32" else {"rtol": 1e-9, "atol": 1e-9}
    results = []
    for formed in (False, True):
        unformed = Unformed(W0, left, right, SCALE, fast=True)
        W = torch.baddbmm(W0, left, right, alpha=SCALE) if formed else unformed
        out = compute(x, W)
        assert type(out) is Tensor
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (x, left, right))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **loose)


def grouped(x: Tensor, W: Tensor, offs: list[int]) -> Tensor:
    """The grouped product in plain operations."""
    return torch.cat([x[a:b] @ W[e] for e, (a, b) in enumerate(itertools.pairwise([0, *offs]))])


@pytest.mark.parametrize("offs", [[3, 3, 4, 9, 11], [0, 0, 11, 11, 11], [2, 5, 7, 8, 9]], ids=["gaps", "one", "tail"])
def test_a_grouped_product(offs: list[int]) -> None:
    """Experts without a token get no gradient; tokens that no expert has come out as zero."""
    W0, left, right = stack()
    x, ends = tokens(11, M), torch.tensor(offs, dtype=torch.int32)

    def ours(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = F.grouped_mm(x, Unformed(W0, left, right, SCALE, fast=True), offs=ends)
        return out

    assert torch.autograd.gradcheck(ours, (x, left, right))
    out = ours(x, left, right)
    expected = grouped(x, torch.baddbmm(W0, left, right, alpha=SCALE), offs)
    torch.testing.assert_close(out[: offs[-1]], expected)
    assert not out[offs[-1] :].any()
    out.square().sum().backward()
    assert left.grad is not None and right.grad is not None
    for e, (a, b) in enumerate(itertools.pairwise([0, *offs])):
        assert left.grad[e].any() == right.grad[e].any() == (b > a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_product_keeps_its_bits(dtype: torch.dtype) -> None:
    W0, left, right = (t.detach() for t in stack(dtype))
    W0, right = F.pad(W0, (0, 8)), torch.zeros(E, R, N + 8, dtype=dtype)
    x, offs = tokens(11, M, dtype=dtype).detach(), torch.tensor([3, 3, 4, 9, 11], dtype=torch.int32)
    x, W0, left = F.pad(x, (0, 4)), F.pad(W0, (0, 0, 0, 4)), F.pad(left, (0, 0, 0, 4))
    base = F.grouped_mm(x, W0, offs=offs)
    assert torch.equal(F.grouped_mm(x, Unformed(W0, left, right, SCALE, fast=True), offs=offs), base)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_grouped_kernels_with_any_rank(rank: int) -> None:
    """What a GPU computes by, whose kernels want aligned rows."""
    g = torch.Generator().manual_seed(1)
    W0, A, B = (torch.randn(shape, generator=g) for shape in ((E, 24, 16), (E, rank, 16), (E, 24, rank)))
    x, offs = torch.randn(11, 16, generator=g), torch.tensor([3, 3, 4, 9, 11], dtype=torch.int32)
    made = Unformed(W0, B, A, SCALE, fast=True).mT
    assert isinstance(made, Unformed)
    torch.testing.assert_close(grouped_by_kernel(x, made, offs), F.grouped_mm(x, made, offs=offs), rtol=1e-5, atol=1e-4)


def test_any_other_operation_forms_it() -> None:
    W0, left, right = stack()
    P, W = Unformed(W0, left, right, SCALE, fast=True), torch.baddbmm(W0, left, right, alpha=SCALE)
    x = tokens(4, M)
    for compute in (
        lambda W: W * 2.0,
        lambda W: 1.0 - W,
        lambda W: W[:, 1:3],
        lambda W: W[1][:5].chunk(2)[1],
        lambda W: W.sum(0),
        lambda W: torch.einsum("tm,emn->etn", x, W),
        lambda W: x @ W,
        lambda W: torch.stack(list(W)),
        lambda W: W[torch.tensor([True, False, True, False, True])],
        lambda W: W.view(E * M, N)[7],
        lambda W: torch.addmm(torch.ones(M, N, dtype=torch.float64), torch.eye(M, dtype=torch.float64), W[2]),
        lambda W: torch.matmul(x[None], W),
        # arguments by their names
        lambda W: F.linear(x, weight=W[1].T),
        lambda W: torch.mm(input=x, mat2=W[1]),
        lambda W: x.matmul(other=W[1]),
        lambda W: torch.bmm(input=x.expand(E, 4, M), mat2=W),
        lambda W: W.transpose(dim0=1, dim1=2),
        lambda W: torch.swapaxes(W, axis0=1, axis1=2),
    ):
        torch.testing.assert_close(compute(P), compute(W))
    assert isinstance(P, Tensor) and P.shape == (E, M, N) and len(P) == E and P.dtype == torch.float64
    assert P.device == W0.device and P.data_ptr() == W0.data_ptr() and P.size(1) == M and P.ndim == 3


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that operations make, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            sizes = [
                t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if isinstance(t, Tensor)
            ]
            self.entries = max([self.entries, *sizes])
        return out


def prepared(name: str, implementation: str) -> Any:
    model = model_of(name)
    model.set_experts_implementation(implementation)
    return fill(attach(model, LoRA(rank=2, alpha=3, targets="gate_up,down")))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_nothing_as_large_as_a_stack_is_made(name: str, implementation: str) -> None:
    model = prepared(name, implementation)
    stacks = [u.low_rank() for u in updates(model).values()]
    least = min(len(p.A) * p.B.shape[1] * p.A.shape[2] for parts in stacks for p in parts.values())
    with Largest() as largest:
        model(IDS[:1, :5]).logits.sum().backward()
    assert 0 < largest.entries < least


def reference(model: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits and gradients of A and B with W0 + ΔW in place of the stacks, computed by PyTorch on the model without adapters."""
    formed = {}
    for name, update in updates(model).items():
        for own, part in update.low_rank().items():
            W0 = model.get_parameter(f"{name}.{own}")
            dW = part.scale * (part.B @ part.A)
            formed[f"{name}.{own}"] = W0 + (dW.mT if getattr(part, "transposed", False) else dW)
    with using(model, None):
        logits = torch.func.functional_call(model, formed, (IDS,)).logits
    return logits.detach(), list(torch.autograd.grad(logits.square().sum(), parameters(model)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_model_with_them_is_the_one_with_formed_weights(name: str, implementation: str) -> None:
    model = prepared(name, implementation)
    logits, gradients = reference(model)
    with torch.no_grad():
        torch.testing.assert_close(run(model), logits, rtol=1e-4, atol=1e-5)
    for training, checkpointing in ((False, False), (True, False), (True, True)):
        model.train(training)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = run(model)
        torch.testing.assert_close(out, logits, rtol=1e-4, atol=1e-5)
        ours = torch.autograd.grad(out.square().sum(), parameters(model))
        for one, other in zip(ours, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MIXTURES)
def test_under_autocast_and_in_half_precision(name: str, implementation: str) -> None:
    model = prepared(name, implementation)
    exact = run(model).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model)
        out.float().square().sum().backward()  # also within it
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters(model))
    assert (out - exact).norm() < 0.1 * exact.norm()
    model.to(torch.bfloat16)
    assert (run(model) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.slow
def test_a_compiled_model_forms_them() -> None:
    model = prepared("Mixtral", "grouped_mm")
    with torch.no_grad():
        expected = run(model)
        torch.testing.assert_close(run(torch.compile(model, backend="eager")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MIXTURES)
def test_rows_of_one_batch_go_through_different_adapters_experts(name: str, implementation: str) -> None:
    """Values as each alone, gradients as one after the other; adapters that leave the experts out, and the base, among them."""
    model = model_of(name)
    model.set_experts_implementation(implementation)
    for seed, (adapter, targets) in enumerate({"a": "all-linear", "b": "experts.down_proj", "c": "q"}.items()):
        fill(attach(model, LoRA(rank=2 + seed, alpha=3, targets=targets), name=adapter), adapter, seed=seed)
        for parameter in parameters(model, adapter):
            parameter.requires_grad_(True)
    names = ["c", "a", None, "b", "a"]
    ids = torch.randint(3, 90, (5, 7), generator=torch.Generator().manual_seed(1))
    every = [p for adapter in "abc" for p in parameters(model, adapter)]
    with route(model, names):
        mixed = model(ids).logits
    gradients = torch.autograd.grad(mixed.square().sum(), every)
    alone = []
    for row, adapter in enumerate(names):
        with using(model, adapter):
            alone.append(model(ids[row : row + 1]).logits)
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(torch.cat(alone).square().sum(), every), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-7)


def test_rows_of_several_each_as_generate_lays_them() -> None:
    model = prepared("Qwen3-MoE", "grouped_mm")
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    beams: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2, "pad_token_id": 0}
    with route(model, ["default", None]):
        mixed = model.generate(ids, **beams)
    alone = []
    for name, row in zip(("default", None), ids, strict=True):
        with using(model, name):
            alone.append(model.generate(row[None], **beams))
    assert torch.equal(mixed, torch.cat(alone))
    with pytest.raises(AdapterError, match="3 rows"), route(model, ["default", None, "default"]):
        model(ids)


def sorted_by_expert() -> Any:
    """JetMoE gives its experts the tokens in the experts' order."""
    import transformers

    config = transformers.JetMoeConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, vocab_size=96,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.JetMoeForCausalLM(config).eval()


def test_tokens_in_another_order_are_refused() -> None:
    model = sorted_by_expert()
    for seed, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2, alpha=3), name=name), name, seed=seed)
    refused = pytest.raises(AdapterError, match=r"cannot be told apart|its rows cannot")
    with torch.no_grad(), refused, route(model, ["a", "b"]):
        model(IDS[:2])
    combine(model, {"a": 0.5, "b": -2.0}, name="both")  # of stacks that are called `weight`
    ours = "model.layers.0.mlp.input_linear.weight"
    torch.testing.assert_close(
        delta(model, ours, "both"), 0.5 * delta(model, ours, "a") - 2.0 * delta(model, ours, "b")
    )
