"""Updates beyond A and B on a linear layer: DoRA, embeddings, modules and tokens that are trained whole. No scale is 1."""

from typing import Any

import pytest
import torch

from deltaw import LoRA, attach, detach, merge, parameters, route, unmerge, using
from deltaw.methods.dora import DoRA
from deltaw.methods.updates.whole import Replaced
from deltaw.model.summary import updates
from tests.conftest import assert_same, bits, fill, snapshot, tiny_llama

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
        pytest.skip("an update of one of two tied weights cannot be merged (tests/model/merging/test_ties.py)")
    before, base = bits(model), model(ids).logits
    fill(attach(model, METHODS[method]))
    branch = model(ids).logits
    assert (branch - base).abs().max() > 1e-2
    merge(model)
    torch.testing.assert_close(model(ids).logits, branch, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_routed_batch_are_as_each_alone(model: Any, ids: torch.Tensor, method: str) -> None:
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


def test_what_is_trained_whole_is_the_bases_own() -> None:
    """Not the A's and B's of an adapter that is on its layers already."""
    model = attach(tiny_llama(), LoRA(rank=2, alpha=5, targets="qv"), name="first")
    attach(model, LoRA(rank=2, alpha=5, targets="mlp", whole="self_attn"), name="second")
    whole = [n for n, u in updates(model, "second").items() if isinstance(u, Replaced)]
    assert len(whole) == 8 and not any("deltaw" in n for n in whole)
