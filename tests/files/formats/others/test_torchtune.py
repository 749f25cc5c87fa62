"""Adapters of torchtune. Files of the real torchtune 0.6.1 gave its logits, to 2e-6 (docs/deploy.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import deltaw
from deltaw.errors import ConfigError, FileError
from deltaw.files.formats import peft
from tests.conftest import tiny_gpt2
from tests.files.formats.others.conftest import KV, D, deltas


def write(folder: Path, tensors: dict[str, Tensor], alpha: int | None = 7) -> Path:
    folder.mkdir()
    torch.save(tensors, folder / "adapter_0.pt")
    if alpha is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": alpha, "peft_type": "LORA"}))
    return folder


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Return transformers' rows in the order of Meta's: of each head's halves x0 x1 … y0 y1 … the pairs x0 y0 x1 y1 …"""
    blocks = [torch.stack([half for pair in zip(*h.chunk(2), strict=True) for half in pair]) for h in rows.chunk(heads)]
    return torch.cat(blocks)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_of_queries_and_keys_go_into_transformers_order(
    family: str, tmp_path: Path, base: Path, draw: Callable[..., Tensor]
) -> None:
    """torchtune has Llama's as Meta has them, Qwen's as transformers; DoRA's magnitudes go with the rows."""
    if family == "qwen2":
        config = Qwen2Config(
            hidden_size=D,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
        )
        Qwen2ForCausalLM(config).save_pretrained(base)
    tensors, B, m = {}, {}, {}
    for name, rows, heads in (("q_proj", D, 4), ("k_proj", KV, 2), ("v_proj", KV, 0)):
        B[name], m[name] = draw(rows, 2), draw(rows).abs()
        turned = heads and family == "llama"
        tensors[f"layers.1.attn.{name}.lora_a.weight"] = draw(2, D)
        tensors[f"layers.1.attn.{name}.lora_b.weight"] = interleaved(B[name], heads) if turned else B[name]
        tensors[f"layers.1.attn.{name}.magnitude"] = interleaved(m[name], heads) if turned else m[name]
    folder = deltaw.convert(write(tmp_path / "tune", tensors), tmp_path / "out", base=base)
    values, file = deltas(folder), peft.read(folder)
    for name in B:
        layer, A = f"model.layers.1.self_attn.{name}", tensors[f"layers.1.attn.{name}.lora_a.weight"]
        torch.testing.assert_close(values[layer], 3.5 * B[name].double() @ A.double())
        assert torch.equal(file.magnitudes[layer], m[name])


def test_names_of_the_other_layers(tmp_path: Path, base: Path, draw: Callable[..., Tensor]) -> None:
    shapes = {"attn.output_proj": (D, D), "mlp.w1": (D, 56), "mlp.w2": (56, D), "mlp.w3": (D, 56)}
    tensors = {f"layers.0.{n}.lora_a.weight": draw(2, k) for n, (k, _) in shapes.items()}
    tensors |= {f"layers.0.{n}.lora_b.weight": draw(d, 2) for n, (_, d) in shapes.items()}
    tensors |= {"output.lora_a.weight": draw(2, D), "output.lora_b.weight": draw(96, 2)}
    folder = deltaw.convert(write(tmp_path / "tune", tensors, None), tmp_path / "out", base=base, alpha=4)
    names = {
        "self_attn.o_proj": "attn.output_proj",
        "mlp.gate_proj": "mlp.w1",
        "mlp.down_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w3",
    }
    for layer, dW in deltas(folder).items():
        key = "output" if layer == "lm_head" else f"layers.0.{names[layer.removeprefix('model.layers.0.')]}"
        expected = 2 * tensors[f"{key}.lora_b.weight"].double() @ tensors[f"{key}.lora_a.weight"].double()
        torch.testing.assert_close(dW, expected)
    assert len(deltas(folder)) == 5


def test_what_is_wrong_or_missing(tmp_path: Path, base: Path, draw: Callable[..., Tensor]) -> None:
    tensors = {
        "layers.0.attn.q_proj.lora_a.weight": draw(2, D), "layers.0.mlp.experts.w1.lora_a.weight": draw(2, D),
        "layers.1.attn.v_proj.lora_a.weight": draw(2, D), "layers.1.attn.v_proj.lora_b.weight": draw(KV, 3), "norm.scale": draw(D),
    }  # fmt: skip
    folder = write(tmp_path / "tune", tensors, None)
    with pytest.raises(FileError) as caught:
        deltaw.convert(folder, tmp_path / "out", base=base)
    for part in ("--alpha", "q_proj has no lora_b", "experts.w1", "v_proj: A is", "norm.scale"):
        assert part in str(caught.value), part
    with pytest.raises(ConfigError, match="--base"):
        deltaw.convert(folder, tmp_path / "out", alpha=1)
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(FileError, match="'gpt2'"):
        deltaw.convert(folder, tmp_path / "out", alpha=1, base=tmp_path / "gpt2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensors", "settings", "said"),
    [({"decoder.layers.0.attn.q_proj.lora_b.weight": (D, 2)}, {}, "another key in the file is the same part"),
     ({"layers.0.attn.q_proj.lora_b.weight": (31, 2)}, {}, r"the adapter is of one that is \[31, 32\]"),
     ({}, {"r": 8}, "the rank is 8, that of the tensors 2"), ({}, {"use_rslora": True}, "use_rslora"),
     ({}, {"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"), ({}, {"lora_alpha": "7"}, "no number above 0")],
    ids=["twice", "odd rows", "rank", "rslora", "pattern", "alpha"],
)  # fmt: skip
def test_files_that_are_not_of_one_adapter(
    tensors: dict[str, Any], settings: Any, said: str, tmp_path: Path, base: Path, draw: Callable[..., Tensor]
) -> None:
    """Under such settings ΔW would be scaled as another adapter's, and of two keys one would be dropped."""
    sizes = {"layers.0.attn.q_proj.lora_a.weight": (2, D), "layers.0.attn.q_proj.lora_b.weight": (D, 2)} | tensors
    folder = write(tmp_path / "tune", {key: draw(*size) for key, size in sizes.items()})
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 7} | settings))
    with pytest.raises(FileError, match=said):
        deltaw.convert(folder, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_one_of_several_files_is_to_be_given(tmp_path: Path, base: Path, draw: Callable[..., Tensor]) -> None:
    key = "layers.0.attn.v_proj.lora_"
    folder = write(tmp_path / "tune", {f"{key}a.weight": draw(2, D), f"{key}b.weight": draw(KV, 2)})
    (folder / "adapter_1.pt").write_bytes((folder / "adapter_0.pt").read_bytes())
    with pytest.raises(FileError, match=r"several adapters: adapter_0\.pt, adapter_1\.pt"):
        deltaw.convert(folder, tmp_path / "out", base=base)
    deltaw.convert(folder / "adapter_1.pt", tmp_path / "out", base=base)
