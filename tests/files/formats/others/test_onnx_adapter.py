"""Adapters for ONNX Runtime and from it. Those with onnxruntime 1.32.0 ran where that was installed (docs/deploy.md)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.errors import FileError
from tests.conftest import fill
from tests.files.formats.others.conftest import deltas

needs = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    return deltaw.save(fill(deltaw.attach(model, deltaw.LoRA(rank=4, alpha=10, targets="attention"))), tmp_path / "a")


@needs
def test_there_and_back_gives_the_same_deltas(adapter: Path, tmp_path: Path, base: Path) -> None:
    deltaw.convert(adapter, tmp_path / "a.onnx_adapter")
    values = deltas(deltaw.convert(tmp_path / "a.onnx_adapter", tmp_path / "back", base=base))
    assert values.keys() == deltas(adapter).keys()
    for layer, dW in deltas(adapter).items():
        torch.testing.assert_close(values[layer], dW, atol=1e-6, rtol=1e-5)


@needs
def test_the_tensors_are_transposed_with_the_scale_in_B(adapter: Path, tmp_path: Path) -> None:
    import onnxruntime

    deltaw.convert(adapter, tmp_path / "a.onnx_adapter")
    values = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter")).get_parameters()
    A, B = (torch.from_numpy(values[f"{Q}.lora_{part}.weight"].numpy()) for part in "AB")
    assert A.shape == (32, 4) and B.shape == (4, 32)
    torch.testing.assert_close((A.double() @ B.double()).T, deltas(adapter)[Q], atol=1e-6, rtol=1e-5)


@needs
def test_names_of_other_builders_and_tensors_that_are_no_A_or_B(adapter: Path, tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime

    def write(parameters: dict[str, Any]) -> Path:
        file, path = onnxruntime.AdapterFormat(), tmp_path / "b.onnx_adapter"
        file.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(v) for n, v in parameters.items()})
        file.export_adapter(str(path))
        return path

    A, B = np.ones((32, 2), np.float32), np.ones((2, 16), np.float32)
    built = {f"model.layers.0.attn.v_proj.lora_{n}.MatMul.weight": v for n, v in (("A", A), ("B", B))}
    layers = deltas(deltaw.convert(write(built), tmp_path / "built"))
    assert list(layers) == ["model.layers.0.self_attn.v_proj"] and layers[next(iter(layers))].shape == (16, 32)
    odd = {f"{Q}.lora_A.quant.weight": A.astype(np.uint8), f"{Q}.lora_A.weight": A, "x": B}
    with pytest.raises(FileError) as caught:
        deltaw.convert(write(odd), tmp_path / "odd")
    assert (
        "quantised" in str(caught.value)
        and f"{Q} has no B" in str(caught.value)
        and "x is float32" in str(caught.value)
    )


@needs
def test_what_it_has_no_form_for_is_named(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    deltaw.save(fill(deltaw.attach(model, deltaw.DoRA(rank=2, targets="q", whole="lm_head"))), tmp_path / "a")
    with pytest.raises(FileError) as caught:
        deltaw.convert(tmp_path / "a", tmp_path / "a.onnx_adapter")
    assert "DoRA's magnitude" in str(caught.value) and "lm_head.weight" in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is not None, reason="onnxruntime is installed")
def test_without_the_package_the_message_says_what_to_install(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"pip install 'deltaw\[onnx\]'"):
        deltaw.convert(adapter, tmp_path / "a.onnx_adapter")
