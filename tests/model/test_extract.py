"""A LoRA out of a model that was fine-tuned whole."""

import copy
from typing import Any

import pytest
import torch

import deltaw
from deltaw.errors import AdapterError, FileError
from deltaw.model.extract import extract
from deltaw.model.summary import updates
from tests.conftest import bits, fill, tiny_llama
from tests.methods.updates.test_weights import model_of, run


@pytest.fixture
def tuned(tiny: Any) -> Any:
    """The model with an update of rank 3 merged in for good."""
    from deltaw.model.merging.merge import settle

    model = copy.deepcopy(tiny)
    fill(deltaw.attach(model, deltaw.LoRA(rank=3, alpha=4.5, targets="attention")), size=0.1)
    deltaw.merge(model)
    settle(model)
    return model


def test_an_update_of_that_rank_is_found_again(tiny: Any, tuned: Any, ids: torch.Tensor) -> None:
    found = extract(tiny, tuned, rank=3)
    assert max(found.errors.values()) < 1e-4 and not found.others
    assert len(found.unchanged) > 0 and set(found.ranks) == set(updates(tiny))
    torch.testing.assert_close(tiny(ids).logits, tuned(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_smaller_rank_has_the_error_that_it_says(tiny: Any, tuned: Any) -> None:
    found = extract(tiny, tuned, rank=2)
    for layer, update in updates(tiny).items():
        dW = update.W0(tuned.get_submodule(layer)) - update.W0(tiny.get_submodule(layer))
        missing = float((dW - deltaw.delta(tiny, layer)).detach().norm() / dW.detach().norm())
        assert found.errors[layer] == pytest.approx(missing, abs=1e-4) and missing > 0.01


def test_energy_chooses_the_smallest_ranks_that_hold_it(tiny: Any, tuned: Any) -> None:
    assert set(extract(tiny, tuned, energy=0.9999).ranks.values()) == {3}


def test_parameters_that_differ_besides_are_named(tiny: Any, tuned: Any) -> None:
    with torch.no_grad():
        tuned.get_input_embeddings().weight[3] += 1.0
    assert extract(tiny, tuned, rank=3).others == (next(n for n, p in tiny.named_parameters()),)


def test_what_cannot_be_extracted_leaves_the_base(tiny: Any, tuned: Any) -> None:
    before = bits(tiny)
    for settings, error, what in (
        ({}, AdapterError, "either a rank or an energy"),
        ({"rank": 2, "energy": 0.5}, AdapterError, "either"),
        ({"energy": 1.5}, AdapterError, "at most 1"),
        ({"rank": 2, "targets": "mlp"}, FileError, "equal in all targeted layers"),
    ):
        with pytest.raises(error, match=what):
            extract(tiny, tuned, **settings)
    with pytest.raises(FileError, match="not of one architecture"):
        extract(tiny, tiny_llama(layers=3), rank=2)
    fill(deltaw.attach(tuned, deltaw.LoRA(rank=2, alpha=3), name="beside"))
    with pytest.raises(AdapterError, match=r"goes through adapter 'beside', which is not in its weights: call merge"):
        extract(tiny, tuned, rank=2)
    assert deltaw.adapters(tiny) == () and all(torch.equal(bits(tiny)[n], v) for n, v in before.items())


@pytest.mark.parametrize("kind", ["Mixtral", "GPT-OSS", "encoder", "attention"])
def test_weights_without_a_layer_are_extracted(kind: str) -> None:
    """With the defaults, on experts (also stored [k, d]) and on PyTorch's attention."""
    from deltaw.model.merging.merge import settle

    base = model_of(kind)
    model = copy.deepcopy(base)
    fill(deltaw.attach(model, deltaw.LoRA(rank=3, alpha=4.5)), size=0.1)
    layers = {
        layer if own == "weight" else f"{layer}.{own}" for layer, u in updates(model).items() for own in u.low_rank()
    }
    expected = {layer: deltaw.delta(model, layer) for layer in layers}
    deltaw.merge(model)
    settle(model)
    made = extract(base, model, rank=3)
    assert set(made.ranks) == set(made.errors) == layers and set(made.ranks.values()) == {3} and not made.others
    for layer, dW in expected.items():
        torch.testing.assert_close(deltaw.delta(base, layer), dW, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(base), run(model), rtol=1e-3, atol=1e-4)


def test_one_rank_for_a_stack_and_its_error() -> None:
    base = model_of("Mixtral")
    tuned = copy.deepcopy(base)
    name = "model.layers.1.mlp.experts.down_proj"
    with torch.no_grad():
        change = torch.randn(tuned.get_parameter(name).shape, generator=torch.Generator().manual_seed(1)) * 0.1
        tuned.get_parameter(name).add_(change)
    made = extract(base, tuned, rank=4, targets="all-linear")
    assert made.ranks == {name: 4} and len(made.unchanged) > 5 and made.others == ()
    missing = float((change - deltaw.delta(base, name)).norm() / change.norm())
    assert made.errors[name] == pytest.approx(missing, abs=1e-3) and missing > 0.1
