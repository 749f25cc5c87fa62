"""A model's positions are a hard end: learned ones fail there with an index error deep inside, so nothing may reach it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, OPTConfig, T5Config

import deltaw
from deltaw import DataConfig, GenerateConfig, LoRA, TrainConfig
from deltaw.data import read
from deltaw.errors import ConfigError, DataError
from deltaw.methods.prefix import Prefix
from deltaw.model.generate import generate
from deltaw.model.inputs import most_positions, within
from deltaw.runs.evaluation.evaluate import evaluate
from tests.data.conftest import CHATML, tiny_tokenizer

LONG = [{"prompt": "long " * 20 + f"{i}", "completion": f"answer {i}"} for i in range(24)]


@pytest.fixture
def short_model() -> Any:
    """(model, tokenizer): 61 learned positions, no multiple of 8."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(CHATML)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=61, vocab_size=len(tokenizer))
    return GPT2LMHeadModel(config).eval(), tokenizer


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (GPT2Config(n_positions=61), 61),
        (LlamaConfig(max_position_embeddings=77), 77),
        (OPTConfig(max_position_embeddings=88), 88),
        (T5Config(), None),
    ],
)
def test_the_bound_is_read_from_the_config(config: Any, most: int | None) -> None:
    model = torch.nn.Module()
    model.config = config
    assert most_positions(model) == most
    assert within(DataConfig(max_length=80), model).max_length == min(80, most or 80)
    assert most_positions(torch.nn.Linear(2, 2)) is None


def test_records_over_it_are_truncated_counted_and_trained(short_model: Any, tmp_path: Path) -> None:
    model, tokenizer = short_model
    config = TrainConfig(out=str(tmp_path / "run"), steps=3, batch=4, samples=2)
    result = deltaw.train(model, LONG, config, method=LoRA(rank=2), tokenizer=tokenizer)
    assert result.data["truncated"] == result.data["kept"] > 0 and result.data["longest"] == 61
    assert result.samples == []  # no position is left for an answer


def test_loss_of_records_over_it(short_model: Any) -> None:
    model, tokenizer = short_model
    found = evaluate(model, tokenizer, read(LONG, DataConfig()), DataConfig(), GenerateConfig(), metrics=("loss",))
    assert 0 < found.scores["loss"].value < 20


def test_prompts_over_it_are_named_before_anything_is_generated(short_model: Any) -> None:
    model, tokenizer = short_model
    done: list[int] = []
    with pytest.raises(DataError, match=r"1 of 3 prompts \(number 2; the longest has 60 tokens\).*61 positions"):
        generate(model, tokenizer, [[5] * 57, [5] * 60, [6]], GenerateConfig(max_new_tokens=4), on_done=done.append)
    assert done == []
    assert len(generate(model, tokenizer, [[5] * 57], GenerateConfig(max_new_tokens=4))) == 1


def test_rows_just_under_it_are_not_padded_over_it(short_model: Any, tmp_path: Path) -> None:
    model, tokenizer = short_model
    records = [{"prompt": f"{i:02}" + "x" * 48, "completion": "y" * (2 + i % 8)} for i in range(24)]
    config = TrainConfig(out=str(tmp_path / "run"), steps=2, batch=4, valid_share=0.2)
    assert deltaw.train(model, records, config, method=LoRA(rank=2), tokenizer=tokenizer).state.step == 2


@pytest.mark.parametrize("where", ["embedding", "layers"])
def test_a_prefix_takes_positions(short_model: Any, tmp_path: Path, where: Any) -> None:
    tokenizer = short_model[1]
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=61, vocab_size=len(tokenizer))
    ).eval()
    base = copy.deepcopy(model)
    config = TrainConfig(out=str(tmp_path / "run"), steps=2, batch=4, samples=0)
    result = deltaw.train(model, LONG, config, method=Prefix(length=9, where=where), tokenizer=tokenizer)
    assert result.data["longest"] == 52 and result.settings["max_length"] == 52
    deltaw.load(base, result.adapter)
    assert most_positions(base) == 52
    found = evaluate(base, tokenizer, read(LONG, DataConfig()), DataConfig(), GenerateConfig(), metrics=("loss",))
    assert found.scores["loss"].value > 0
    with pytest.raises(DataError, match="52 positions"):
        generate(base, tokenizer, [[5] * 45], GenerateConfig(max_new_tokens=8))
    generate(base, tokenizer, [[5] * 44], GenerateConfig(max_new_tokens=8))
    deltaw.detach(base)
    with pytest.raises(ConfigError, match="takes 61 positions, and the model has 61"):
        deltaw.train(
            base, LONG, dataclasses.replace(config, overwrite=True), method=Prefix(length=61), tokenizer=tokenizer
        )
