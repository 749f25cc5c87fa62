"""The questions that every update answers, held against each other over all classes of updates."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw import BitFit, LoRA
from deltaw.errors import TargetError
from deltaw.layers.kinds import as_matrix, as_stored
from deltaw.layers.ops.merging import dense
from deltaw.methods import updates as package
from deltaw.methods.plan import PRESETS
from deltaw.methods.registry import contestants
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.weights import OnWeights, put_on_weight
from deltaw.model.summary import updates
from tests.conftest import MAKERS, fill
from tests.methods.updates.test_weights import Encoder, mixtral, oss

SMALL = {"rank": 2, "size": 4, "length": 3, "drop": 1}
"""Settings that a preset may have, in the size of a tiny model."""
FORMS: dict[str, tuple[str, Any]] = {
    "slices": ("gpt2", LoRA(rank=2, alpha=5, targets="c_attn[q,v]")),
    "pissa": ("llama", LoRA(rank=2, alpha=5, targets="qv", init="pissa")),
    "tokens": ("llama", LoRA(rank=2, alpha=5, targets="qv", tokens="5,7,90")),
    "head": ("llama", LoRA(rank=2, alpha=5, targets="qv", whole="lm_head")),
    "added biases": ("llama", BitFit(add=True)),
    "attention": ("encoder", LoRA(rank=2, alpha=5)),
    "experts": ("mixtral", LoRA(rank=2, alpha=5)),
    "transposed experts": ("oss", LoRA(rank=2, alpha=5)),
}
"""What no preset makes: model and method."""
MODELS: dict[str, Any] = {**MAKERS, "encoder": Encoder, "mixtral": mixtral, "oss": oss}


def attached(case: str) -> Any:
    """A tiny model with this preset, or this form, of random values."""
    torch.manual_seed(1)
    if case in FORMS:
        name, method = FORMS[case]
        model = deltaw.attach(MODELS[name]().eval(), method)
    else:
        (contestant,) = contestants(case)
        settings = vars(contestant.method) | {k: v for k, v in SMALL.items() if k in PRESETS[case][1].settings}
        method = type(contestant.method)(**settings)
        try:
            model = deltaw.attach(MODELS["llama"]().eval(), method)
        except TargetError:
            model = deltaw.attach(MODELS["gpt2"]().eval(), method)
    for parameter in model.parameters():  # GPT-OSS's experts start from uninitialised memory
        nn.init.normal_(parameter, std=0.2)
    return fill(model)


CASES = [*PRESETS, *FORMS]


@pytest.fixture(scope="module", params=CASES)
def pairs(request: pytest.FixtureRequest) -> list[tuple[Update, Any]]:
    """An update of each class that the case has, and the layer that it is on; the low-rank ones of weights by themselves too."""
    model = attached(request.param)
    own = [(update, model.get_submodule(name)) for name, update in updates(model).items()]
    return list({type(update): (update, layer) for update, layer in own}.values())


def classes_of(cls: type) -> Iterator[type]:
    yield cls
    for child in cls.__subclasses__():
        yield from classes_of(child)


def test_every_class_of_update_is_tried_here() -> None:
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    every = {cls for cls in classes_of(Update) if cls.__module__.startswith("deltaw.") and not cls.__abstractmethods__}
    seen: set[type] = set()
    for case in CASES:
        for update in updates(attached(case)).values():
            seen |= {type(update), *(type(part) for part in update.low_rank().values())}
    assert seen == every


def test_it_fits_the_layer_that_it_was_made_for(pairs: Any) -> None:
    for update, layer in pairs:
        assert update.misfit(layer) is None and update.other_shape(layer) is None


def test_factors_are_a_and_b_of_its_trained_parameters_or_none(pairs: Any) -> None:
    for update, _ in pairs:
        for part in (update, *update.low_rank().values()):
            trained = {id(p) for p in part.parameters()}
            factors = part.factors()
            assert not factors or list(factors) == ["A", "B"]
            assert all(isinstance(p, nn.Parameter) and id(p) in trained for p in factors.values())
            assert bool(factors) == (part.low_rank() == {"weight": part})


def test_low_rank_parts_and_values_are_of_parameters_and_account_for_all_that_it_trains(pairs: Any) -> None:
    for update, layer in pairs:
        parts, values, replaced = update.low_rank(), update.values(), update.replaced()
        assert parts.keys() <= layer._parameters.keys() and replaced.keys() <= layer._parameters.keys()
        assert all(name in layer._parameters or name == "bias" for name in values)
        assert not parts.keys() & values.keys()
        assert update.of_weights == (bool(parts) and parts != {"weight": update})
        trained = {id(p) for p in update.parameters()}
        named = {id(p) for part in parts.values() for p in part.parameters()}
        named |= {id(p) for p in (*values.values(), *replaced.values())}
        assert named <= trained
        if update.mergeable and not update.own_sum:
            assert named == trained
        assert update.covers(layer) == (
            bool(values) and values.keys() == {n for n, p in layer._parameters.items() if p is not None}
        )


def test_it_has_a_reason_exactly_where_no_merge_can_take_it(pairs: Any) -> None:
    for update, layer in pairs:
        assert update.mergeable == (not update.unmergeable) == bool(update.changes(layer))


def test_a_merge_makes_of_a_parameter_what_its_readers_see(pairs: Any) -> None:
    for update, layer in pairs:
        for own_name, change in update.changes(layer).items():
            before, seen = layer._parameters[own_name], update.parameter(layer, own_name)
            if before is None:  # an added bias
                assert torch.equal(seen, update.values()[own_name])
            elif seen.shape == before.shape:
                W0 = as_matrix(layer, own_name, before.detach())
                merged = as_stored(layer, own_name, W0 + dense(change, W0))
                torch.testing.assert_close(seen.detach(), merged, rtol=1e-4, atol=1e-4)
        untouched = layer._parameters.keys() - update.changes(layer).keys()
        assert all(update.parameter(layer, n) is layer._parameters[n] for n in untouched)


def test_an_exact_product_is_the_change_that_a_merge_makes(pairs: Any) -> None:
    for update, layer in pairs:
        for own_name, part in update.low_rank().items():
            product = part.exact_product
            if product is None:
                continue
            assert not product.A.requires_grad and not product.B.requires_grad
            dW = product.scale * product.B @ product.A
            change = update.changes(layer)[own_name]
            W0 = as_matrix(layer, own_name, layer._parameters[own_name].detach())
            expected = dense(change, W0).view(-1, W0.shape[1])
            if dW.ndim == 3:
                dW = (dW.mT if getattr(part, "transposed", False) else dW).flatten(0, 1)
            torch.testing.assert_close(dW, expected, rtol=1e-4, atol=1e-5)
            assert float(dW.square().sum()) == pytest.approx(part.squared(), rel=1e-3)
        assert update.low_rank() or update.exact_product is None


def test_only_what_is_a_and_b_and_nothing_else_is_computed_with_others(pairs: Any) -> None:
    for update, _ in pairs:
        assert update.plain in (None, update) and update.stackable == (update.plain is not None)
        if update.plain is not None:
            assert [n for n, _ in update.named_parameters()] == ["A", "B"] and not list(update.buffers())


def test_a_sum_of_its_own_form_adds_what_its_terms_add(pairs: Any) -> None:
    for update, layer in pairs:
        assert update.why_no_sum(update) is None
        if not update.own_sum:
            with pytest.raises(NotImplementedError):
                update.summed(layer, [(update, 1.0)], {})
            continue
        with torch.no_grad():
            total = update.summed(layer, [(update, 0.25), (update, 0.5)], {})
        assert type(total) is type(update) and total.misfit(layer) is None
        for own_name, change in total.changes(layer).items():
            W0 = as_matrix(layer, own_name, layer._parameters[own_name].detach())
            expected = 0.75 * dense(update.changes(layer)[own_name], W0)
            torch.testing.assert_close(dense(change, W0), expected, rtol=1e-4, atol=1e-4)


def test_what_it_moved_is_two_squares(pairs: Any) -> None:
    for update, layer in pairs:
        moved, base = update.moved(layer)
        assert 0 < moved < float("inf") and 0 < base < float("inf")


def test_copied_and_pickled_it_is_the_same(pairs: Any) -> None:
    for update, _ in pairs:
        for twin in (copy.deepcopy(update), pickle.loads(pickle.dumps(update))):
            assert type(twin) is type(update) and repr(twin) == repr(update)
            assert all(
                torch.equal(a, b) for a, b in zip(twin.state_dict().values(), update.state_dict().values(), strict=True)
            )
            assert (
                twin.low_rank().keys() == update.low_rank().keys() and twin.factors().keys() == update.factors().keys()
            )


def test_the_factors_kept_in_another_dtype_are_still_its_factors(pairs: Any) -> None:
    for update, _ in pairs:
        for part in copy.deepcopy(update).low_rank().values():
            part.keep_in(torch.bfloat16)
            assert {p.dtype for p in part.factors().values()} == {torch.bfloat16}
            assert {id(p) for p in part.factors().values()} <= {id(p) for p in part.parameters()}
            assert part.A.dtype == part.B.dtype or part.A.dtype == torch.float32  # a start stays as it is


def test_updates_of_unlike_forms_say_why_they_have_no_sum() -> None:
    of = {case: list(updates(attached(case)).values()) for case in ("ia3", "tokens", "full", "lora")}
    outputs, inputs = (next(u for u in of["ia3"] if u.inputs is side) for side in (False, True))
    assert "scale its inputs, others its outputs" in (outputs.why_no_sum(inputs) or "")
    rows = next(u for u in of["tokens"] if u.own_sum)
    for one, other in ((outputs, rows), (rows, of["full"][0]), (of["lora"][0], outputs)):
        assert "some of the adapters train it whole" in (one.why_no_sum(other) or "")
        assert "some of the adapters train it whole" in (other.why_no_sum(one) or "")
    assert (
        of["lora"][0].why_no_sum(of["full"][0]) is None
    )  # by their parts and values, which may be of other parameters


def test_a_weight_takes_one_update_and_its_module_no_other() -> None:
    on = next(u for u in updates(attached("experts")).values() if isinstance(u, OnWeights))
    (name, part), *_ = on.low_rank().items()
    of_modules: dict[str, Update] = {"layer": part}
    assert not put_on_weight(of_modules, "layer", name, part) and of_modules == {"layer": part}
    assert put_on_weight(of_modules, "experts", name, part) and not put_on_weight(of_modules, "experts", name, part)
    assert of_modules["experts"].low_rank() == {name: part}
