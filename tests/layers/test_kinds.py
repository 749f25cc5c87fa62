"""One layer of each kind: which layers take an update, and that an adapted one is still the layer it was."""

import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw import LoRA, attach, use
from deltaw.errors import TargetError
from tests.conftest import fill

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
