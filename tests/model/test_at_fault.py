"""Logits that are not finite stop an answer, and the error says whether the base or the adapter makes them so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

import deltaw
from deltaw.config import GenerateConfig
from deltaw.errors import AdapterError, FileError
from deltaw.model.generate import generate
from deltaw.model.pretrained import load_pretrained
from tests.conftest import byte_llama, fill
from tests.data.conftest import tiny_tokenizer, write_chat_model

FEW = GenerateConfig(max_new_tokens=4)
PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture
def small() -> Any:
    tokenizer = tiny_tokenizer()
    return byte_llama(tokenizer), tokenizer


def spoil(model: Any, value: float, name: str | None = None) -> None:
    """Give an adapter's B this value."""
    with torch.no_grad():
        for update in deltaw.model.summary.updates(model, name).values():
            for parameter in update.parameters():
                parameter.fill_(value)


def test_an_adapter_whose_products_overflow_is_blamed_with_its_largest_layers(small: Any) -> None:
    model, tokenizer = small
    deltaw.attach(model, deltaw.LoRA(rank=2, targets="q"), name="wild")
    spoil(model, 6e29)
    with pytest.raises(
        AdapterError, match=r"(?s)With the adapter 'wild'.*q_proj has entries of 6e\+29.*--dtype float32"
    ):
        generate(model, tokenizer, PROMPTS, FEW)
    with deltaw.using(model, None):
        assert len(generate(model, tokenizer, PROMPTS, FEW)) == 2


def test_the_base_is_blamed_with_its_tensors_though_an_adapter_is_in_use(small: Any) -> None:
    model, tokenizer = small
    deltaw.attach(model, deltaw.LoRA(rank=2, targets="q"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    for beams in (1, 2):
        with pytest.raises(FileError, match=r"(?s)1 of its tensors.*model\.layers\.1\.mlp\.down_proj\.weight"):
            generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=4, beams=beams))


def test_a_base_too_large_for_its_dtype_is_told_from_a_damaged_one(small: Any) -> None:
    model, tokenizer = small
    model.half()
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
        model.lm_head.weight.fill_(6e4)
    with pytest.raises(FileError, match=r"Its weights are finite, but too large for float16"):
        generate(model, tokenizer, PROMPTS, FEW)


@pytest.mark.parametrize("value", [1e12, 1e18])
def test_what_a_norm_makes_of_an_overflow_is_no_answer(small: Any, value: float) -> None:
    """Infinity squared in a norm leaves zeros: all logits are equal, and the first token was the answer."""
    model, tokenizer = small
    deltaw.attach(model, deltaw.LoRA(rank=2, targets="o,down"))
    spoil(model, value)
    with pytest.raises(AdapterError, match="all equal as after an overflow; the base alone is sound"):
        generate(model, tokenizer, PROMPTS, FEW)


def test_in_a_route_the_adapters_of_the_rows_are_named(small: Any) -> None:
    model, tokenizer = small
    for name in ("sound", "wild"):
        fill(deltaw.attach(model, deltaw.LoRA(rank=2, targets="q"), name=name))
    spoil(model, 6e29, "wild")
    with deltaw.route(model, ["sound", "wild"]), pytest.raises(AdapterError, match="'wild'"):
        generate(model, tokenizer, PROMPTS, FEW)
    with deltaw.route(model, ["sound", None]):
        assert len(generate(model, tokenizer, PROMPTS, FEW)) == 2


def test_a_merged_adapter_is_named_as_merged(small: Any) -> None:
    model, tokenizer = small
    fill(deltaw.attach(model, deltaw.LoRA(rank=2, targets="q"), name="a"))
    deltaw.merge(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(AdapterError, match=r"(?s)'a'.*merged are not finite"):
        generate(model, tokenizer, PROMPTS, FEW)


def test_an_encoders_decoder_is_watched_too(small: Any) -> None:
    _, tokenizer = small
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = deltaw.attach(T5ForConditionalGeneration(config).eval(), deltaw.LoRA(rank=2, targets="q"))
    spoil(model, 1e38)
    with pytest.raises(AdapterError, match="With the adapter 'default'"):
        generate(model, tokenizer, PROMPTS, FEW)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_base_is_refused_as_it_is_opened(tmp_path: Path, value: float) -> None:
    write_chat_model(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.input_layernorm.weight"][3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FileError, match=r"(?s)is damaged: 1 of its tensors.*layers\.0\.input_layernorm\.weight"):
        load_pretrained(str(tmp_path / "model"), device="cpu")


def test_commands_say_it_and_print_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from deltaw.cli.main import main

    write_chat_model(tmp_path / "model")
    model = load_pretrained(str(tmp_path / "model"), device="cpu").model
    deltaw.attach(model, deltaw.LoRA(rank=2, targets="q,v,o,down"))
    spoil(model, 1e18)
    deltaw.save(model, tmp_path / "adapter")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": " Ho"}) + "\n")
    opening = [str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")]
    for words in (
        ["generate", *opening[:1], "Hi", *opening[1:]],
        ["eval", opening[0], str(tmp_path / "data.jsonl"), *opening[1:]],
    ):
        capsys.readouterr()
        assert main([*words, "--max-new-tokens", "2"]) in (AdapterError.exit_code, 6)
        printed = capsys.readouterr()
        assert "With the adapter 'default'" in printed.err and "entries of 1e+18" in printed.err and not printed.out


def test_an_adapter_whose_products_overflow_is_neither_saved_nor_read(small: Any, tmp_path: Path) -> None:
    model, _ = small
    deltaw.attach(model, deltaw.LoRA(rank=2, targets="q"))
    spoil(model, 1.0)
    folder = deltaw.save(model, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 6e29 for name, tensor in load_file(path).items()}, path)
    overflow = r"(?s)q_proj: A has entries of 6e\+29 and B of 6e\+29, whose products overflow"
    with pytest.raises(FileError, match=overflow):
        deltaw.load(byte_llama(tiny_tokenizer()), folder)
    spoil(model, 6e29)
    with pytest.raises(FileError, match=overflow):
        deltaw.save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()
