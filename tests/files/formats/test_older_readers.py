"""Merged folders have the settings that older readers look for, and transformers reads the same from them as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import deltaw
from deltaw.files.formats.older_readers import add_older_settings, older_config
from tests.conftest import fill, tiny_llama
from tests.data.conftest import CHATML, tiny_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def saved(folder: Path, rope: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model folder as transformers 5 writes it, with these rotary settings."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    config = tiny_llama().config
    config.rope_parameters = rope
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())
    return folder


def adapter_of(base: Path, path: Path) -> Path:
    model = deltaw.attach(AutoModelForCausalLM.from_pretrained(base), deltaw.LoRA(rank=2))
    fill(model)
    return deltaw.save(model, path)


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 7000.0}, LLAMA3], ids=["plain", "llama3"])
def test_a_merged_config_has_its_rotary_settings_by_their_older_names(rope: dict[str, Any], tmp_path: Path) -> None:
    base = saved(tmp_path / "base", rope)
    adapter, merged = adapter_of(base, tmp_path / "adapter"), tmp_path / "merged"
    deltaw.merge_files(base, adapter, merged, reversible=True)
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_theta"] == rope["rope_theta"] and config["torch_dtype"] == config["dtype"] == "bfloat16"
    expected = {k: v for k, v in rope.items() if k != "rope_theta"} if rope is LLAMA3 else None
    assert config.get("rope_scaling") == expected
    # transformers 5 reads what it read before, and computes the same bits
    before, after = (AutoConfig.from_pretrained(f).to_dict() | {"_name_or_path": ""} for f in (base, merged))
    assert before == after
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    deltaw.load(model, adapter)
    deltaw.merge(model)
    ids = torch.arange(3, 90).view(1, -1)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(merged, dtype="auto")(ids).logits)
    # a reader of the older names alone gets the same model
    older = {k: v for k, v in config.items() if k != "rope_parameters"}
    assert type(model.config).from_dict(older).rope_parameters == model.config.rope_parameters
    assert deltaw.unmerge_files(merged, adapter, tmp_path / "back").exact
    assert (tmp_path / "back" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["gpt_neox", "phi", "gemma3_text", "modernbert", "qwen3", "gpt2", "gemma3", "llama"])
def test_the_older_names_mean_the_same_to_transformers(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind)
    if hasattr(config, "rope_parameters"):
        _give_unusual_thetas(config.rope_parameters)
    config.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    add_older_settings(tmp_path)
    added = json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == before
    assert {key: added[key] for key in new if not isinstance(new[key], dict)} == {
        key: value for key, value in new.items() if not isinstance(value, dict)
    }
    older = _without(added, "rope_parameters")
    if hasattr(config, "rope_parameters"):
        assert "rope_parameters" not in older and len(added) > len(new)
        assert type(config).from_dict(older).rope_parameters == config.rope_parameters


def _give_unusual_thetas(rope: dict[str, Any]) -> None:
    for i, part in enumerate([v for v in rope.values() if isinstance(v, dict)] or [rope]):
        part["rope_theta"] = 1234.0 + i


def _without(value: Any, name: str) -> Any:
    return {k: _without(v, name) for k, v in value.items() if k != name} if isinstance(value, dict) else value


def test_names_that_are_there_already_stay() -> None:
    config = {
        "rope_theta": 5.0,
        "rope_parameters": {"rope_theta": 6.0, "rope_type": "default"},
        "torch_dtype": "float16",
    }
    assert older_config(config) == config


def test_a_config_that_older_names_would_change_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stranger's settings: a class of transformers that has another meaning for a name, and no class at all."""
    text = json.dumps({"model_type": "nobodys", "dtype": "float32", "rope_parameters": {"rope_theta": 3.0}})
    (tmp_path / "config.json").write_text(text)
    add_older_settings(tmp_path)
    assert (tmp_path / "config.json").read_text() == text and "nobodys" in caplog.text


def test_a_tokenizer_is_one_that_transformers_4_opens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML, special=("<|tool|>",))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend" and before["extra_special_tokens"] == ["<|tool|>"]
    add_older_settings(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["chat_template"] == CHATML
    assert settings["additional_special_tokens"] == ["<|tool|>"] and "extra_special_tokens" not in settings
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.extra_special_tokens == ["<|tool|>"] and type(again) is type(tokenizer)
    text = "Hi <|tool|> a<|im_end|>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
