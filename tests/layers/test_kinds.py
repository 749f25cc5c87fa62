"""One layer of each kind: which layers take an update, and that an adapted one is still the layer it was."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw import LoRA, attach, use
from deltaw.errors import TargetError
from deltaw.layers import kinds
from deltaw.layers.kinds import KINDS, PARAMETER, QUANTISED, Kind, kind_named
from deltaw.model.summary import updates
from tests.conftest import bits, fill

LAYERS = {"Linear": (lambda: nn.Linear(6, 4), "input"), "Conv1D": (lambda: Conv1D(4, 6), "x")}
METHOD = LoRA(rank=2, alpha=5)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapted_layer_takes_its_input_by_name(kind: str) -> None:
    make, name = LAYERS[kind]
    model = nn.Sequential(make())
    fill(attach(model, METHOD))
    x = torch.randn(3, 6)
    for active in ("default", None):
        use(model, active)
        assert torch.equal(model[0](**{name: x}), model[0](x))


@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapted_model_goes_through_pickle(kind: str) -> None:
    model = nn.Sequential(LAYERS[kind][0](), nn.Tanh())
    x = torch.randn(3, 6)
    base = model(x)
    fill(attach(model, METHOD))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x)) and type(twin[0]) is type(model[0])
    use(twin, None)
    assert torch.equal(twin(x), base) and not torch.equal(model(x), base)
    assert type(deltaw.detach(twin)[0]) is type(LAYERS[kind][0]())


def test_shapes_can_be_asked_without_memory() -> None:
    model = attach(nn.Sequential(nn.Linear(6, 4, device="meta")), METHOD)
    assert model(torch.empty(2, 6, device="meta")).shape == (2, 4)


def parametrized(layer: Any) -> str:
    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    parametrize.register_parametrization(layer, "weight", Double())
    return "another parametrization"


def replaced(layer: Any) -> str:
    layer.forward = lambda x, own=layer.forward: own(x)
    return "forward was replaced"


@pytest.mark.parametrize("spoil", [parametrized, replaced])
def test_a_layer_that_would_not_go_through_its_update_is_refused(spoil: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    why = spoil(model[0])
    with pytest.raises(TargetError, match=f"'0' cannot take the update: .*{why}"):
        attach(model, LoRA(rank=2, alpha=5, targets="0"))
    left_out = deltaw.summary(attach(model, METHOD)).adapters["default"].left_out
    assert why in left_out["0"]


@pytest.mark.parametrize("kind", [*KINDS, QUANTISED, PARAMETER], ids=lambda kind: type(kind).__name__)
def test_a_pickle_or_a_copy_of_a_kind_is_the_kind(kind: Kind) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(kind, protocol)) is kind
    assert copy.copy(kind) is kind and copy.deepcopy(kind) is kind
    assert kind_named(type(kind).__name__) is kind


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6), nn.Conv1d(6, 4, 1), nn.Embedding(6, 4)], ids=repr)
def test_a_pickle_of_version_0_1_computes_what_it_did(layer: nn.Module) -> None:
    """Its updates hold the classes of their kinds, which were never made into objects."""
    model = nn.Sequential(layer)
    fill(attach(model, LoRA(rank=2, alpha=5, targets="0")))
    (update,) = updates(model).values()
    kind = update.kind
    x = (
        torch.tensor([[0, 3, 5]])
        if isinstance(layer, nn.Embedding)
        else torch.randn(2, 6, *[3] * isinstance(layer, nn.Conv1d))
    )
    expected = model(x)
    vars(update)["kind"] = type(kind)
    pickled = pickle.dumps(model)
    again = pickle.loads(pickled)
    assert torch.equal(again(x), expected) and updates(again)["0"].kind is kind


class Tall(nn.Module):
    """A dense layer of nobody's, whose weight is stored [k, d]."""

    def __init__(self, k: int, d: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(k, d)), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class TallKind(Kind):
    layer_class = Tall
    transposed = True


def test_a_kind_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", (*KINDS, TallKind()))  # the line
    model = nn.Sequential(Tall(6, 4))
    x, before = torch.randn(3, 6), bits(model)
    base = model(x)
    fill(attach(model, METHOD))
    out = model(x)
    assert torch.allclose(out, base + x @ deltaw.delta(model, "0").t(), atol=1e-5) and not torch.equal(out, base)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in deltaw.parameters(model))
    assert torch.equal(copy.deepcopy(model)(x), out) and torch.equal(pickle.loads(pickle.dumps(model))(x), out)
    deltaw.save(model, tmp_path / "a")
    deltaw.merge(model)
    assert torch.allclose(model(x), out, atol=1e-5)
    deltaw.detach(model)
    assert type(model[0]) is Tall and all(torch.equal(v, before[n]) for n, v in bits(model).items())
    deltaw.load(model, tmp_path / "a")
    assert torch.equal(model(x), out)
