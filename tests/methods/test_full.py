"""Full fine-tuning: its file as weights or as differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import deltaw
from deltaw.errors import FileError
from deltaw.files.formats.method_file import as_difference, from_difference, problems_with
from deltaw.files.formats.peft import tensors_of
from deltaw.files.formats.peft.metadata import sealed
from deltaw.methods.full import Full
from deltaw.model.summary import updates
from tests.methods.test_methods import build, trained


def test_differences_give_back_the_trained_bits_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    model = trained(build("bert"), Full(kept="difference", whole="classifier"))
    layer = "bert.encoder.layer.1.output.dense"
    W0, W = model.get_submodule(layer).weight.detach(), updates(model)[layer]._parameters["weight"]
    with torch.no_grad():
        W[0, 0] = 1e-12  # which no difference of this precision leads to
    expected = {n: p.clone() for n, p in own_parameters(model)}
    deltaw.save(model, tmp_path / "a")
    tensors, metadata = tensors_of(tmp_path / "a")
    assert torch.equal(tensors[f"base_model.model.{layer}.weight"], W.detach() - W0)
    assert 0 in tensors[f"base_model.model.{layer}.weight:where"]
    assert json.loads(metadata["deltaw_replaced"]) == ["classifier.bias", "classifier.weight"]
    twin = build("bert")
    with torch.no_grad():
        twin.classifier.weight.add_(1)  # another head: that one is the file's own
    deltaw.load(twin, tmp_path / "a")
    assert all(torch.equal(p, expected[n]) for n, p in own_parameters(twin))
    with pytest.raises(FileError, match="other base weights"):
        deltaw.load(build("bert", seed=9), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors[f"base_model.model.{layer}.weight:where"][0] = 10**6
    save_file(tensors, path, metadata=sealed(tensors, metadata))
    with pytest.raises(FileError, match=f"{layer}.weight: the entries kept beside its difference"):
        deltaw.load(build("bert"), tmp_path / "a")


def own_parameters(model: Any) -> Any:
    return ((f"{n}.{own}", p) for n, u in updates(model).items() for own, p in u._parameters.items())


@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2), min_size=1, max_size=6))
def test_a_difference_leads_back_to_the_same_bits(pairs: list[tuple[float, float]]) -> None:
    W, W0 = torch.tensor(pairs).T.contiguous()
    made = as_difference("W", W, W0)
    assert all(bool(torch.isfinite(t).all()) for t in made.values()) and not problems_with(made)
    assert torch.equal(from_difference("W", made, W0).view(torch.int32), W.view(torch.int32))
