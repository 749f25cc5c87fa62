"""Formats told apart by names and contents, and what becomes of a folder that is PEFT's already."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft as real_peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.errors import ConfigError, FileError
from deltaw.files.convert import target_of
from deltaw.files.formats import peft
from deltaw.model.ends import teach
from tests.conftest import fill, tiny_gpt2, tiny_llama
from tests.data.conftest import tiny_tokenizer

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def unsloth(folder: Path) -> Path:
    """A folder as Unsloth leaves it: PEFT's files, settings of its own, a base in four bits, other files."""
    folder.mkdir()
    settings = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": {
            "base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama", "unsloth_fixed": True,
        }, "base_model_name_or_path": "unsloth/tiny-bnb-4bit", "bias": "none", "lora_alpha": 6, "lora_dropout": 0, "peft_type": "LORA",
        "r": 2, "rank_pattern": {}, "target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)", "task_type": "CAUSAL_LM",
        "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 2)}, folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "README.md").write_text("unsloth")
    return folder


def test_unsloths_folder_becomes_one_of_ours_and_mlx_lms(tmp_path: Path) -> None:
    folder = deltaw.convert(unsloth(tmp_path / "u"), tmp_path / "out")
    file = peft.read(folder)
    assert (
        list(file.factors) == ["model.layers.0.self_attn.q_proj"]
        and file.scales["model.layers.0.self_attn.q_proj"] == 3
    )
    assert file.config.base_model_name_or_path == "unsloth/tiny-bnb-4bit"
    deltaw.load(tiny_llama(), folder, check_base=False)
    mlx = deltaw.convert(tmp_path / "u", tmp_path / "mlx", to="mlx-lm")
    tensors = load_file(mlx / "adapters.safetensors")
    assert set(tensors) == {f"model.layers.0.self_attn.q_proj.lora_{part}" for part in "ab"}


def test_one_of_both_sides_is_pefts(tmp_path: Path) -> None:
    deltaw.convert(unsloth(tmp_path / "u"), tmp_path / "mlx", to="mlx-lm")
    with pytest.raises(ConfigError, match="convert twice"):
        deltaw.convert(tmp_path / "mlx", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("name", "to", "target"),
    [("out", None, "peft"), ("a.gguf", None, "gguf"), ("a.pt", None, "loralib"), ("a.onnx_adapter", None, "onnx_adapter"), ("out", "mlx-lm", "mlx-lm")],
)  # fmt: skip
def test_the_ending_says_the_format(name: str, to: str | None, target: str) -> None:
    assert target_of(Path(name), to) == target


@pytest.mark.parametrize(("name", "to"), [("a.gguf", "mlx-lm"), ("out", "gguf"), ("out", "nothing")])
def test_a_name_and_a_format_that_do_not_go_together_are_refused(name: str, to: str) -> None:
    with pytest.raises(ConfigError):
        target_of(Path(name), to)


def test_what_is_no_adapter_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="to='mlx-lm'"):
        deltaw.convert(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FileError, match=r"kohya's in \.safetensors"):
        deltaw.convert(tmp_path / "a.txt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="not an adapter folder"):
        deltaw.convert(tmp_path / "empty", tmp_path / "out")


def test_a_local_base_is_found_again_for_gguf(tmp_path: Path) -> None:
    """adapter_config.json has its folder's own name; where it lies is in the header."""
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    deltaw.save(fill(deltaw.attach(model, deltaw.LoRA(rank=2))), tmp_path / "a")
    assert deltaw.convert(tmp_path / "a", tmp_path / "a.gguf").is_file()
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="--base"):
        deltaw.convert(tmp_path / "a", tmp_path / "b.gguf")


def test_what_comes_from_gguf_names_its_base_and_its_task(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    deltaw.save(fill(deltaw.attach(model, deltaw.LoRA(rank=2))), tmp_path / "a")
    deltaw.convert(tmp_path / "a", tmp_path / "a.gguf", base=tmp_path / "base")
    settings = json.loads(
        (
            deltaw.convert(tmp_path / "a.gguf", tmp_path / "b", base=tmp_path / "base") / "adapter_config.json"
        ).read_text()
    )
    assert (settings["base_model_name_or_path"], settings["task_type"]) == ("./base", "CAUSAL_LM")


def test_what_gguf_has_no_form_for_is_named_with_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    deltaw.save(deltaw.attach(model, deltaw.DoRA(rank=2)), tmp_path / "a")
    with pytest.raises(FileError, match=r"DoRA's magnitudes of .* and 10 more\n.*deltaw export writes a whole model"):
        deltaw.convert(tmp_path / "a", tmp_path / "a.gguf", base=tmp_path / "base")


@pytest.mark.parametrize(("ends", "told"), [([2], ""), ([2, 5], r"end with \S+ \(5\)")])
def test_tokens_that_end_answers_are_told_as_texts_where_the_base_has_others(
    ends: list[int], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    model.config.eos_token_id = 2
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    deltaw.attach(model, deltaw.LoRA(rank=2))
    teach(model, "default", tuple(ends))
    deltaw.save(model, tmp_path / "a")
    deltaw.convert(tmp_path / "a", tmp_path / "out", to="mlx-lm", base=tmp_path / "base")
    said = [record.getMessage() for record in caplog.records if "was taught to end" in record.getMessage()]
    assert len(said) == bool(told) and all(re.search(told, text) for text in said)


@pytest.mark.parametrize(
    ("settings", "said"), [({"alpha": 5}, "alpha is 5"), ({"parts": ["q"]}, "parts is q")], ids=str
)
@pytest.mark.parametrize("to", ["peft", "mlx-lm"])
def test_settings_that_would_decide_nothing_are_refused(settings: Any, said: str, to: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        deltaw.convert(unsloth(tmp_path / "u"), tmp_path / "out", to=to, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out", "out.bin"])
def test_a_base_of_another_size_is_refused_whatever_is_written(name: str, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    tiny_llama().save_pretrained(tmp_path / "llama")
    folder = unsloth(tmp_path / "u")
    deltaw.convert(folder, tmp_path / f"fits_{name}", base=tmp_path / "llama")
    with pytest.raises(FileError, match=r"self_attn\.q_proj is none of the base's layers"):
        deltaw.convert(folder, tmp_path / name, base=tmp_path / "gpt2")
    save_file({f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(30, 2)}, folder / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(FileError, match=r"\[32, 32\] in the base, the adapter is of one that is \[30, 32\]"):
        deltaw.convert(folder, tmp_path / name, base=tmp_path / "llama")
    assert not (tmp_path / name).exists()


def test_pefts_own_gpt2_is_no_adapter_for_mlx_lm_either(tmp_path: Path) -> None:
    """PEFT's file says with one setting what ours says by layer; mlx-lm passed over its layers without a word."""
    model = real_peft.get_peft_model(
        tiny_gpt2(), real_peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(FileError, match=r"h\.0\.attn\.c_attn: GPT-2's Conv1D"):
        deltaw.convert(tmp_path / "a", tmp_path / "out", to="mlx-lm")
    assert not (tmp_path / "out").exists()


def test_values_of_the_base_that_peft_keeps_are_named_when_they_are_left_out(tmp_path: Path, caplog: Any) -> None:
    config = real_peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    real_peft.get_peft_model(tiny_llama(tied=False), config).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    deltaw.convert(tmp_path / "a", tmp_path / "out", to="mlx-lm")
    assert "Left out, as the base's own values, which PEFT keeps beside an update: lm_head.weight" in caplog.text
