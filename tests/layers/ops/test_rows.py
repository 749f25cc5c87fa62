"""Rows with adapters of their own, in the cases between two options: dropout, training and evaluation, dtypes, ranks, biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw import DoRA, LoRA, attach, route, using
from deltaw.errors import AdapterError
from deltaw.layers.ops import rows
from deltaw.layers.ops.rows import Rows
from deltaw.model.summary import updates
from tests.conftest import fill, tiny_llama
from tests.methods.updates.test_weights import model_of


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


# --- one layer, without a model --------------------------------------------------------------------------------


def layer_alone(names: list[str | None], **settings: Any) -> tuple[Rows, Any, dict[str, Any]]:
    """Rows, a layer, and its updates a and b."""
    model = layer_with(a=lora(**settings), b=lora(**settings))
    return Rows(names), model.dense, {name: updates(model, name)["dense"] for name in "ab"}


@pytest.mark.parametrize("shape", [(3, 40), (6, 40), (3, 5, 40), (6, 2, 40)], ids=str)
@torch.no_grad()
def test_a_layers_input_has_the_rows_first_whatever_follows(shape: tuple[int, ...]) -> None:
    rows, dense, own = layer_alone(["b", None, "a"])
    x, W0 = torch.randn(*shape), [dense.weight, dense.bias]
    out = rows.through(dense, own, x, nn.functional.linear(x, *W0))
    each = shape[0] // 3
    for row, name in enumerate(rows.names):
        part = x[row * each : (row + 1) * each]
        expected = nn.functional.linear(part, *W0) if name is None else own[name].branch(dense, part)
        torch.testing.assert_close(out[row * each : (row + 1) * each], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [((3,), (3,)), ((4, 40), (4, 24)), ((2, 40), (2, 24)), ((3, 40), (6, 24))], ids=str)
def test_rows_that_a_layer_cannot_tell_are_refused(sizes: Any) -> None:
    rows, dense, own = layer_alone(["b", None, "a"])
    x, out = (torch.zeros(size) for size in sizes)
    with pytest.raises(AdapterError, match=rf"names 3 rows, but a layer's input is \[{sizes[0][0]}\b.*must be 3,"):
        rows.through(dense, own, x, out)


def called_by(name: str, module: str, function: Any) -> Any:
    """Call `function` from one of this name, in a module of that name."""
    scope = {"__name__": module, "function": function}
    exec(f"def {name}(): return function()", scope)
    return scope[name]()


def test_more_rows_than_names_are_for_generate_of_transformers_alone() -> None:
    rows, few = Rows(["b", None, "a"]), torch.zeros(3, 7)
    for x in (few, few[:, :, None], few[:, :, None, None]):
        rows.check(x, 2)
    rows.check(few[:, 0], 1)
    with pytest.raises(AdapterError, match=r"names 3 rows, but a layer's input is \[3\]"):
        rows.check(few[:, 0], 2)
    with pytest.raises(AdapterError, match=r"names 1 row, but"):
        Rows(["a"]).check(few, 2)
    with pytest.raises(AdapterError, match=r"names 2 rows, but"):
        Rows(["a", "a"]).check(few, 2)
    modelling = "transformers.generation.utils"
    for n in (1, 2, 4, 5, 6, 7, 9):
        many = torch.zeros(n, 7)
        for name, module in (("generate", "other"), ("forward", modelling), ("sample", modelling)):
            with pytest.raises(AdapterError, match=rf"names 3 rows, but a layer's input is \[{n}, 7\]"):
                called_by(name, module, lambda many=many: rows.check(many, 2))
        if n in (6, 9):
            called_by("generate", modelling, lambda many=many: rows.check(many, 2))
        else:
            with pytest.raises(AdapterError, match="names 3 rows"):
                called_by("generate", modelling, lambda many=many: rows.check(many, 2))


DTYPES = [
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.bfloat16),
    (torch.float8_e4m3fn, torch.float32, torch.float32),
]


@pytest.mark.parametrize(("stored", "computed", "expected"), DTYPES, ids=str)
@torch.no_grad()
def test_stacks_are_in_the_adapters_dtype_where_that_is_less(stored: Any, computed: Any, expected: Any) -> None:
    rows, dense, own = layer_alone(["b", None, "a"])
    for update in own.values():
        update.to(stored)
    kept: dict[Any, Any] = {}
    rows.through(dense, own, torch.zeros(3, 40, dtype=computed), torch.zeros(3, 24, dtype=computed), kept)
    (layer,) = kept.values()
    assert [(stack.A.dtype, stack.B.dtype) for stack in layer.stacks] == [(expected, expected)]


def test_stacks_are_kept_for_one_dtype_while_no_gradient_flows_into_them() -> None:
    rows, dense, own = layer_alone(["b", None, "a"])
    x = torch.randn(3, 40)
    kept: dict[Any, Any] = {}

    def branches(dtype: torch.dtype = torch.float32) -> Tensor:
        return rows.through(dense, own, x.to(dtype), torch.zeros(3, 24, dtype=dtype), kept)

    for update in own.values():
        update.requires_grad_(True)
    first = branches()
    assert first.requires_grad and not kept
    with torch.no_grad():
        assert torch.equal(branches(), first) and len(kept) == 1
        own["a"].B.mul_(2.0)
        assert torch.equal(branches(), first)  # within one call of generate nobody changes them
        double = branches(torch.float64)
        assert double.dtype == torch.float64
        torch.testing.assert_close(double[2], 2.0 * first[2].double(), atol=1e-5, rtol=1e-5)
    own["b"].requires_grad_(False)
    kept.clear()
    assert branches().requires_grad and not kept
    own["a"].requires_grad_(False)
    assert not branches().requires_grad and kept


def test_dropout_of_a_layer_is_its_updates_own_and_for_training() -> None:
    rows, dense, own = layer_alone(["b", None, "a"], dropout=0.5)
    x = torch.ones(3, 40)
    for training in (True, False):
        for update in own.values():
            update.train(training)
        once, again = (rows.through(dense, own, x, torch.zeros(3, 24)) for _ in range(2))
        assert torch.equal(once, again) is not training and once.isfinite().all() and once[0].any() and once[2].any()


@torch.no_grad()
def test_experts_take_tokens_that_are_the_batchs_rows() -> None:
    model = model_of("Qwen3-MoE")
    for seed, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2 + seed, alpha=5), name=name), name, seed=seed)
    experts = model.model.layers[0].mlp.experts
    own = {name: updates(model, name)["model.layers.0.mlp.experts"] for name in "ab"}
    chosen = torch.randint(4, (15, 2), generator=torch.Generator().manual_seed(1))
    x, weights = torch.randn(15, 32), torch.rand(15, 2)
    rows = Rows(["b", None, "a"])
    with using(model, None):
        plain = experts(x, chosen, weights)
        for given, named in (([x, chosen, weights], {}), ([x], {"top_k_index": chosen, "top_k_weights": weights})):
            out = rows.by_tokens(experts, own, experts, given, named)
            torch.testing.assert_close(out[5:10], plain[5:10])
            for row, name in ((0, "b"), (2, "a")):
                part = slice(5 * row, 5 * row + 5)
                expected = own[name].branch(experts, x[part], chosen[part], weights[part])
                torch.testing.assert_close(out[part], expected, atol=1e-5, rtol=1e-5)
                assert (out[part] - plain[part]).abs().max() > 1e-3
    for wrong in ([x], [x[:14], chosen[:14]], [x, chosen[:12]], [x, None], [None, None], [x, torch.tensor(1.0)]):
        with pytest.raises(AdapterError, match=r"is not given each token of a batch of 3 rows"):
            rows.by_tokens(experts, own, experts, wrong, {})


def test_routes_of_the_same_names_are_the_same() -> None:
    one = Rows(["a", None, "b"])
    assert one == Rows(["a", None, "b"]) and hash(one) == hash(Rows(["a", None, "b"]))
    for other in (Rows(["b", None, "a"]), Rows(["a", None]), ("a", None, "b"), "a", None):
        assert one != other


def test_experts_may_get_rows_of_tokens_beside_what_was_chosen_for_each() -> None:
    rows, module = Rows(["a", None, "a"]), torch.nn.Identity()
    x, weights = torch.randn(3, 5, 4), torch.randn(15, 2)
    plain = lambda x, weights: x.flatten(0, 1) * weights.sum(1, keepdim=True)  # noqa: E731
    assert torch.equal(rows.by_tokens(module, {}, plain, [x], {"weights": weights}), plain(x, weights))
    several = torch.randn(6, 5, 4), torch.randn(30, 2)  # two parts for a row
    assert torch.equal(rows.by_tokens(module, {}, plain, several, {}), plain(*several))
    for wrong in (
        [x, weights[:12]],
        [x[:, :4], weights],
        [x, weights.unsqueeze(0)],
        [x[:2], weights],
        [x[:2], weights[:10]],
    ):
        with pytest.raises(AdapterError, match="is not given each token of a batch of 3 rows"):
            rows.by_tokens(module, {}, plain, wrong, {})


@torch.no_grad()
def test_an_adapter_with_a_vocabulary_of_its_own_has_no_batch_with_others() -> None:
    model = tiny_llama(tied=False).eval()
    for name in "ab":
        fill(attach(model, LoRA(rank=2, targets="q", whole="lm_head"), name=name), name)
    head, own = model.lm_head, {name: updates(model, name)["lm_head"] for name in "ab"}
    x = torch.randn(6, 4, 32)
    rows, plain = Rows(["b", "a", None]), torch.randn(6, 4, 96)
    out = rows.through(head, own, x, plain)
    assert torch.equal(out[4:], plain[4:])
    for part, name in ((slice(0, 2), "b"), (slice(2, 4), "a")):
        torch.testing.assert_close(out[part], own[name].branch(head, x[part]))
    for count in (95, 99):
        said = rf"'[ab]' has another vocabulary than the base \(96 tokens, not {count}\)"
        with pytest.raises(AdapterError, match=said):
            rows.through(head, own, x, torch.randn(6, 4, count))
