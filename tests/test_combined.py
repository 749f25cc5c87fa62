"""One adapter out of several: exact sums, sums cut to a rank, TIES and DARE. No scale is 1."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw import LoRA, attach, delta, merge, unmerge, using
from deltaw.attached import updates
from deltaw.combined import combine
from deltaw.errors import AdapterError
from tests.conftest import bits, fill, tiny_gpt2, tiny_llama
from tests.test_updates import METHODS


@pytest.fixture
def two(tiny: Any) -> Any:
    fill(attach(tiny, LoRA(rank=4, alpha=10), name="a"), seed=1)
    fill(attach(tiny, LoRA(rank=2, alpha=7, targets="mlp"), name="b"), seed=2)
    return tiny


def expected(model: Any, layer: str, weights: dict[str, float]) -> torch.Tensor:
    """Σ weight·ΔW over the adapters that have the layer."""
    return sum((w * delta(model, layer, n) for n, w in weights.items() if layer in updates(model, n)), torch.zeros(()))


@pytest.mark.parametrize("weights", [{"a": 0.3, "b": -1.7}, {"b": 1.0}, {"a": 1.0}, {"a": -1.0}], ids=str)
def test_a_sum_is_exact_and_merges_to_the_same_bits(two: Any, ids: torch.Tensor, weights: dict[str, float]) -> None:
    made = combine(two, weights, name="sum")
    assert set(made.ranks) == {layer for n in weights for layer in updates(two, n)} and not any(made.errors.values())
    for layer, update in updates(two, "sum").items():
        assert update.rank == sum(updates(two, n)[layer].rank for n in weights if layer in updates(two, n))
        torch.testing.assert_close(delta(two, layer, "sum"), expected(two, layer, weights))
    assert deltaw.adapters(two).active == "b"  # as it was
    merge(two, "sum")
    one = bits(two)
    unmerge(two)
    merge(two, weights=weights)
    assert all(torch.equal(bits(two)[n], w) for n, w in one.items())


def test_an_identity_is_the_adapter_itself(two: Any, ids: torch.Tensor) -> None:
    combine(two, {"a": 1.0}, name="again")
    with using(two, "a"):
        logits = two(ids).logits
    with using(two, "again"):
        torch.testing.assert_close(two(ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_a_task_is_taken_away(two: Any, ids: torch.Tensor) -> None:
    combine(two, {"a": 1.0, "b": 1.0}, name="both")
    combine(two, {"both": 1.0, "b": -1.0}, name="rest")
    for layer in updates(two, "a"):
        torch.testing.assert_close(delta(two, layer, "rest"), delta(two, layer, "a"), atol=1e-5, rtol=1e-4)


def test_a_sum_cut_to_a_rank_says_its_error(two: Any) -> None:
    made = combine(two, {"a": 0.3, "b": -1.7}, name="cut", rank=3, activate=True)
    assert deltaw.adapters(two).active == "cut"
    for layer, error in made.errors.items():
        dW = expected(two, layer, {"a": 0.3, "b": -1.7})
        assert made.ranks[layer] == 3
        assert error == pytest.approx(float((dW - delta(two, layer, "cut")).norm() / dW.norm()), abs=1e-4)
    assert any(error > 0.01 for error in made.errors.values())
    assert max(combine(two, {"a": 2.0, "b": 1.0}, name="whole", rank=6).errors.values()) < 1e-6


def test_ties_by_hand() -> None:
    from deltaw.combined import _ties

    one = torch.tensor([[4.0, -3.0, 0.1, 2.0]])
    other = torch.tensor([[-1.0, -5.0, 3.0, 0.2]])
    # the larger half of each: (4, −3, 0, 0) and (0, −5, 3, 0); the signs agree or are alone
    assert torch.equal(_ties([one, other], 0.5), torch.tensor([[4.0, -4.0, 3.0, 0.0]]))
    # all entries: signs elected + − + +; of the first column only 4 agrees
    assert torch.allclose(_ties([one, other], 1.0), torch.tensor([[4.0, -4.0, 1.55, 1.1]]))


def test_dare_keeps_the_sum_on_average_and_follows_its_seed() -> None:
    from deltaw.combined import _dare

    dW = torch.full((200, 200), 2.0)
    made = _dare([dW, -0.5 * dW], 0.25, torch.Generator().manual_seed(0))
    assert float(made.mean()) == pytest.approx(1.0, abs=0.05) and made.unique().numel() == 4
    assert torch.equal(made, _dare([dW, -0.5 * dW], 0.25, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_ties_and_dare_make_adapters_that_can_be_saved(two: Any, how: Any, tmp_path: Any) -> None:
    made = combine(two, {"a": 1.0, "b": 0.5}, name="mix", how=how, rank=4, density=0.6, seed=5)
    assert set(made.errors) == set(updates(two, "a")) and all(0 < e < 1 for e in made.errors.values())
    deltaw.save(two, tmp_path / "mix", name="mix")
    deltaw.load(two, tmp_path / "mix", name="back")
    for layer in updates(two, "mix"):
        assert torch.equal(delta(two, layer, "mix"), delta(two, layer, "back"))


def test_what_is_wrong_is_said_at_once(two: Any) -> None:
    with pytest.raises(AdapterError, match=r"(?s)needs a rank.*density is 2"):
        combine(two, {"a": 1.0}, name="x", how="ties", density=2.0)
    with pytest.raises(AdapterError, match=r"taken|attached already"):
        combine(two, {"a": 1.0}, name="b")
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        combine(two, {"c": 1.0}, name="x")
    with pytest.raises(AdapterError, match=r"(?s)weights is empty.*how is 'mean'"):
        combine(two, {}, name="x", how="mean")  # type: ignore[arg-type]
    assert deltaw.adapters(two) == ("a", "b")


WEIGHTS = {"a": 0.7, "b": -0.4}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_combines_to_what_merging_several_makes(method: str, ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = tiny_llama(tied=False).eval()
    for seed, name in enumerate(WEIGHTS):
        fill(attach(model, METHODS[method], name=name), seed=seed)
    combine(model, WEIGHTS, name="both", rank=32 if "dora" in method else None)  # all that these layers can have
    ids[0, :3] = torch.tensor([5, 7, 90])
    with using(model, "both"):
        branch = model(ids).logits
    merge(model, weights=WEIGHTS)
    torch.testing.assert_close(branch, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_biases_combine(ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = tiny_gpt2().eval()
    for seed, name in enumerate(WEIGHTS):
        attach(model, LoRA(rank=2, alpha=5), name=name)
        if name == "a":
            for layer, update in updates(model, name).items():
                update.bias = torch.nn.Parameter(torch.zeros_like(model.get_submodule(layer).bias))
        fill(model, name, seed=seed)
    combine(model, WEIGHTS, name="both")
    with using(model, "both"):
        branch = model(ids).logits
    merge(model, weights=WEIGHTS)
    torch.testing.assert_close(branch, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"tokens": "96,97"}, {"whole": "embed_tokens,lm_head"}], ids=["tokens", "whole"])
def test_vocabularies_of_different_sizes_combine(settings: dict[str, str], ids: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = tiny_llama().eval()
    for seed, (name, count) in enumerate([("a", 98), ("b", 99)]):
        model = copy.deepcopy(base)
        model.resize_token_embeddings(count)
        fill(attach(model, LoRA(rank=2, alpha=5, targets="qv", **settings)), seed=seed)
        deltaw.load(base, deltaw.save(model, tmp_path / name), name=name)
    combine(base, {"a": 0.5, "b": 0.5}, name="both", activate=True)
    assert base(ids).logits.shape[-1] == (98 if "tokens" in settings else 99)
    base.resize_token_embeddings(99)
    combine(base, {"a": 1.0}, name="same")
    ids[0, :2] = torch.tensor([96, 97])
    with using(base, "a"):
        alone = base(ids).logits
    with using(base, "same"):
        assert torch.equal(base(ids).logits, alone)
