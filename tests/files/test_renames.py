"""Adapters whose layers have other names in this version of transformers than in the one that they were made with."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from deltaw import LoRA, attach, load, save
from deltaw.errors import FileError
from deltaw.files.formats.peft.metadata import sealed
from tests.conftest import fill, tiny_llama


def tiny_llava() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        max_position_embeddings=128,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    ).eval()


# As LLaVA's modules were called before transformers 4.52, and as Qwen2-VL's were
BEFORE = {
    "llava": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.", "lm_head.": "language_model.lm_head."},
    "qwen2_vl": {"model.language_model.": "model."},
}  # fmt: skip


def under_old_names(source: Path, folder: Path, names: dict[str, str]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())

    def old(key: str) -> str:
        name = key.removeprefix("base_model.model.")
        new = next((n for n in names if name.startswith(n)), "")
        return f"base_model.model.{names.get(new, '')}{name.removeprefix(new)}"

    tensors = {old(key): tensor for key, tensor in load_file(source / "adapter_model.safetensors").items()}
    with safe_open(source / "adapter_model.safetensors", "pt") as file:
        save_file(tensors, folder / "adapter_model.safetensors", metadata=sealed(tensors, file.metadata()))
    return folder


@pytest.mark.parametrize("before", BEFORE)
def test_they_are_found_with_a_notice(
    before: str, ids: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    model = tiny_llava()
    plain = copy.deepcopy(model)
    targets = "q_proj,v_proj" if before == "llava" else "*language_model*q_proj"
    fill(attach(model, LoRA(rank=4, alpha=10, targets=targets, whole="lm_head" if before == "llava" else "")))
    expected = model(ids.clamp(max=94)).logits
    old = under_old_names(save(model, tmp_path / "new"), tmp_path / "old", BEFORE[before])
    load(plain, old)  # the fingerprint is of contents: it is the same base by any names
    assert torch.equal(plain(ids.clamp(max=94)).logits, expected)
    assert "have other names in this model" in caplog.text


def test_names_that_nobody_knows_are_an_error(tmp_path: Path) -> None:
    model = tiny_llama()
    source = save(fill(attach(model, LoRA(rank=4, alpha=10, targets="qv"))), tmp_path / "a")
    old = under_old_names(source, tmp_path / "old", {"model.layers.": "transformer.blocks."})
    with pytest.raises(FileError, match=r"no layer 'transformer.blocks.0.self_attn.q_proj'"):
        load(model, old, name="b")
