"""What a model takes: nothing gets beyond its positions, and a classifier's scores do not depend on padding.

Learned positions fail beyond their end with an index error deep inside.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    T5Config,
    T5ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import deltaw
from deltaw import DataConfig, GenerateConfig, LoRA, TrainConfig
from deltaw.data import read
from deltaw.data.items import encode_labelled
from deltaw.errors import ConfigError, DataError, FileError
from deltaw.methods.prefix import Prefix
from deltaw.model.generate import generate
from deltaw.model.inputs import most_positions, row_padding, settle_padding, within
from deltaw.model.pretrained import pad_id, save_pretrained
from deltaw.runs.evaluation.evaluate import evaluate
from deltaw.training.opening import opened
from deltaw.training.tasks import Classification
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


def test_records_over_it_have_a_loss(short_model: Any) -> None:
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


def classifier(place: Path, kind: str, *, config_pad: int | None, tokenizer_pad: str | None) -> Path:
    """A decoder with a head for two classes, and a tokenizer that has its own padding token or none."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer_pad
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_labels": 2,
        "pad_token_id": config_pad,
        "bos_token_id": 1,
    }
    torch.manual_seed(2)
    if kind == "gpt2":
        model: Any = GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes))
    else:
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        model = LlamaForSequenceClassification(
            LlamaConfig(num_key_value_heads=2, initializer_range=0.3, **small, **sizes)
        )
    model.config.id2label, model.config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
    save_pretrained(model, tokenizer, place / "classifier")
    return place / "classifier"


PADS = [(None, None), (0, None), (5, "<s>"), (None, "<s>"), (7, "!")]
"""The config's padding token, and the tokenizer's. "!" is a token of texts."""


@torch.no_grad()
def plain_scores(model: Any, rows: list[list[int]], pad: int, *, left: bool = False) -> torch.Tensor:
    """By transformers alone, all rows in one batch."""
    width = max(map(len, rows))
    gaps = [[pad] * (width - len(row)) for row in rows]
    ids = torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)])
    mask = torch.tensor(
        [[0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g) for r, g in zip(rows, gaps, strict=True)]
    )
    return model.eval()(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("config_pad", "tokenizer_pad"), PADS)
def test_a_classifiers_scores_do_not_depend_on_padding(
    tmp_path: Path, kind: str, config_pad: int | None, tokenizer_pad: str | None
) -> None:
    """A config with another padding token than the tokenizer's had the score taken at a token of the padding: 0.35 in logits."""
    folder = classifier(tmp_path, kind, config_pad=config_pad, tokenizer_pad=tokenizer_pad)
    data = DataConfig(task="classification", labels=["a", "b"])
    loaded = opened(str(folder), data)
    texts = [
        "a text",
        "one that is longer than others",
        "b",
        "with <|im_end|> in it",
        "at its end !",
        "and at its end <|im_end|>",
    ]
    records = read([{"text": t, "label": "a"} for t in texts], data)
    items = encode_labelled(records, loaded.tokenizer, data).examples
    together = Classification().logits(loaded, items, 6, lambda done: None)
    alone = Classification().logits(loaded, items, 1, lambda done: None)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3  # other texts, other scores
    # what is saved is scored by transformers alone as here, padded on either side
    save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    rows, pad = [item.inputs["input_ids"] for item in items], pad_id(loaded.tokenizer)
    torch.testing.assert_close(plain_scores(plain, rows, pad), together, rtol=1e-4, atol=1e-5)
    if kind == "llama":  # whose positions are relative
        torch.testing.assert_close(plain_scores(plain, rows, pad, left=True), together, rtol=1e-3, atol=1e-4)
    for row, score in zip(rows, together, strict=True):
        torch.testing.assert_close(plain_scores(plain, [row], pad)[0], score, rtol=1e-4, atol=1e-5)


def test_a_users_own_classifier_keeps_its_padding_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = classifier(tmp_path, "llama", config_pad=0, tokenizer_pad=None)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = opened(str(folder), DataConfig(task="classification", labels=["a", "b"])).tokenizer
    settle_padding(model, tokenizer, pad_id(tokenizer), "mine", scored=True, ours=False)
    assert model.config.pad_token_id == 0 and row_padding(model, 9) == 0
    assert "pad_token_id 0, its tokenizer pads with" in caplog.text
    model.config.pad_token_id = None  # transformers refuses several rows
    settle_padding(model, tokenizer, pad_id(tokenizer), "mine", scored=True, ours=False)
    assert model.config.pad_token_id == pad_id(tokenizer)


def test_a_head_that_cannot_score_what_the_tokenizer_makes_is_refused_in_one_message(tmp_path: Path) -> None:
    """T5's takes a text's end token, which this tokenizer does not put there: transformers' own ValueError came through."""
    tokenizer = tiny_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, num_labels=2,
        eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=0,
    )  # fmt: skip
    save_pretrained(T5ForSequenceClassification(config), tokenizer, tmp_path / "t5")
    with pytest.raises(
        FileError, match=r"t5 cannot score a text: its T5ForSequenceClassification raises .* <eos> token"
    ):
        opened(str(tmp_path / "t5"), DataConfig(task="classification", labels=["a", "b"]))


def test_a_head_that_takes_the_last_place_of_a_row_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    config = XLNetConfig(
        vocab_size=len(tokenizer), d_model=32, n_layer=1, n_head=4, d_inner=48, num_labels=2, initializer_range=0.5,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_pretrained(XLNetForSequenceClassification(config), tokenizer, tmp_path / "xlnet")
    data = DataConfig(task="classification", labels=["a", "b"])
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(FileError, match="depend on padding: its XLNetForSequenceClassification"):
            opened(str(tmp_path / "xlnet"), data, dtype=dtype)  # type: ignore[arg-type]
    config = FNetConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    save_pretrained(FNetForSequenceClassification(config), tokenizer, tmp_path / "fnet")
    with pytest.raises(FileError, match="its FNetForSequenceClassification knows no mask"):
        opened(str(tmp_path / "fnet"), data)
