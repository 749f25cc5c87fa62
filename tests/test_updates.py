"""Updates beyond A and B on a linear layer: DoRA, embeddings, modules and tokens that are trained whole. No scale is 1."""

from typing import Any

import pytest
import torch

from deltaw import LoRA, adapters, attach, detach, merge, parameters, route, unmerge, using
from deltaw.attached import updates
from deltaw.methods.dora import DoRA
from deltaw.updates import INITS, Replaced
from tests.conftest import assert_same, bits, fill, snapshot, tiny_gpt2, tiny_llama

METHODS = {
    "dora": DoRA(rank=4, alpha=10),
    "embedding": LoRA(rank=4, alpha=10, targets="qv,embed_tokens"),
    "embedding by dora": DoRA(rank=4, alpha=10, targets="qv,embed_tokens"),
    "whole head": LoRA(rank=4, alpha=10, targets="qv", whole="lm_head"),
    "whole norms": LoRA(rank=4, alpha=10, targets="qv", whole="*norm"),
    "tokens": LoRA(rank=4, alpha=10, targets="qv", tokens="5,7,90"),
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    return tiny_llama(tied=request.param).eval()


@pytest.mark.parametrize("method", METHODS)
def test_attached_it_changes_nothing_and_detached_neither(model: Any, ids: torch.Tensor, method: str) -> None:
    before, base = snapshot(model), model(ids).logits
    attach(model, METHODS[method])
    torch.testing.assert_close(model(ids).logits, base, rtol=1e-5, atol=1e-5)
    detach(model)
    assert_same(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_the_branch_and_unmerged_is_exact(model: Any, ids: torch.Tensor, method: str) -> None:
    if model.config.tie_word_embeddings and "embedding" in method:
        pytest.skip("an update of one of two tied weights cannot be merged (tests/test_merged.py)")
    before, base = bits(model), model(ids).logits
    fill(attach(model, METHODS[method]))
    branch = model(ids).logits
    assert (branch - base).abs().max() > 1e-2
    merge(model)
    torch.testing.assert_close(model(ids).logits, branch, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_8_rows_are_as_each_alone(model: Any, ids: torch.Tensor, method: str) -> None:
    fill(attach(model, METHODS[method], name="a"), seed=1)
    fill(attach(model, LoRA(rank=2, alpha=5), name="b"), seed=2)
    names = ["a", None, "b"]
    with torch.no_grad():
        with route(model, names):
            mixed = model(ids).logits
        for row, name in enumerate(names):
            with using(model, name):
                torch.testing.assert_close(mixed[row], model(ids).logits[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_each_of_its_parameters_learns(model: Any, ids: torch.Tensor, method: str) -> None:
    fill(attach(model, METHODS[method]))
    ids[0, :3] = torch.tensor([5, 7, 90])
    model(ids).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters(model))
    assert all(p.grad is None for n, p in model.named_parameters() if ".deltaw." not in n)


def test_dora_on_transposed_layers(ids: torch.Tensor) -> None:
    model = tiny_gpt2().eval()
    before = bits(model)
    fill(attach(model, METHODS["dora"]))
    branch = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, branch, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())
    assert adapters(model).active == "default"


def test_what_is_trained_whole_is_the_bases_own() -> None:
    """Not the A's and B's of an adapter that is on its layers already."""
    model = attach(tiny_llama(), LoRA(rank=2, alpha=5, targets="qv"), name="first")
    attach(model, LoRA(rank=2, alpha=5, targets="mlp", whole="self_attn"), name="second")
    whole = [n for n, u in updates(model, "second").items() if isinstance(u, Replaced)]
    assert len(whole) == 8 and not any("deltaw" in n for n in whole)


def test_a_starts_with_the_variance_that_its_method_says() -> None:
    """Gaussian: 1/k (paper, section 4.1), so that Ax is as large as x. Kaiming: uniform up to 1/sqrt(k), a third of that."""
    torch.manual_seed(0)
    for k in (60, 900):
        A = INITS["gaussian"](300, k, torch.device("cpu"), torch.float64)
        assert A.shape == (300, k) and A.dtype == torch.float64
        assert float(A.std()) == pytest.approx(k**-0.5, rel=0.02) and abs(float(A.mean())) < 0.02 * k**-0.5
        assert float(A.abs().max()) > 3 * k**-0.5
        A = INITS["kaiming"](300, k, torch.device("cpu"), torch.float32)
        assert float(A.std()) == pytest.approx((3 * k) ** -0.5, rel=0.02)
        assert 0.99 * k**-0.5 < float(A.abs().max()) <= k**-0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {2: 1.0, 8: 1.0}),
        ({"alpha": 6.0}, {2: 3.0, 8: 0.75}),
        ({"scaling": "alpha/sqrt(r)"}, {4: 2.0, 9: 3.0}),
        ({"alpha": 6.0, "scaling": "alpha/sqrt(r)"}, {4: 3.0, 9: 2.0}),
    ],
    ids=str,
)
def test_the_scale_without_alpha_is_of_each_layers_rank(settings: dict[str, Any], scales: dict[int, float]) -> None:
    method = LoRA(rank=5, **settings)
    assert {rank: method.scale(rank) for rank in scales} == pytest.approx(scales)
    model = attach(tiny_llama(), LoRA(rank=5, targets={"q": 4, "down": 9}, **settings))
    live = {update.rank: update.scale for update in updates(model).values()}
    assert live == pytest.approx({rank: method.scale(rank) for rank in (4, 9)})
