"""A run's end: it says that nothing was learned, and what to try, or that more was learned by heart than helps."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw import DataConfig, LoRA, TrainConfig
from tests.conftest import byte_llama
from tests.data.conftest import CHATML, tiny_tokenizer

WORDS = ["red", "blue", "green", "white", "black", "pink", "grey", "brown"]
RECORDS = [{"prompt": f"{a} and {b}?", "completion": f" {b} {a}"} for a in WORDS for b in WORDS if a != b]


def warnings_of(out: Path, records: list[dict[str, Any]], method: Any = None, **settings: Any) -> list[str]:
    tokenizer = tiny_tokenizer(CHATML)
    model = byte_llama(tokenizer)
    data = DataConfig(template="plain")
    config = TrainConfig(out=str(out), samples=0, data=data, **settings)
    return deltaw.train(model, records, config, method=method or LoRA(rank=4), tokenizer=tokenizer).warnings


def test_texts_that_were_not_learned_are_told_with_the_usual_rate(tmp_path: Path) -> None:
    told = " ".join(warnings_of(tmp_path / "run", RECORDS, lr=1e-7, steps=12))
    assert "Nothing was learned: the loss is" in told and "on 6 held-out records" in told
    assert "Try --lr 0.0015, the usual rate: it was 1e-07." in told and "when_nothing_is_learned" in told


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"steps": 1}, "1 steps only: try --steps 3."),
        ({"steps": 110, "lr": 0.05}, "Try the usual rate, --lr 0.0015: it was 0.05."),
        ({"steps": 110}, "Look at the records (deltaw data DATA --model MODEL)"),
    ],
)
def test_the_advice_fits_the_run(tmp_path: Path, settings: dict[str, Any], advice: str) -> None:
    # Classes by chance: nobody can learn them
    chance, tokenizer = random.Random(0), tiny_tokenizer(CHATML)
    byte_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": f"{i * 7919 % 1000:03}", "label": chance.choice("ab")} for i in range(200)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(out=str(tmp_path / "run"), samples=0, valid_share=0.4, **settings)
    result = deltaw.train(str(tmp_path / "model"), str(tmp_path / "data.jsonl"), config, method=LoRA(rank=4))
    (told,) = result.warnings
    assert "giving each class its share of the training records, or all the same, has 0." in told and advice in told, (
        told
    )


def test_texts_that_were_learned_have_no_such_warning(tmp_path: Path) -> None:
    assert not warnings_of(tmp_path / "run", RECORDS, lr=0.02, steps=60)


def test_texts_learned_by_heart_are_told(tmp_path: Path) -> None:
    # What follows a prompt has nothing to do with it: the held-out answers cannot be learned
    records = [{"prompt": f"{i * 7919 % 1000:03}", "completion": f" {i * i * 31 % 977:03}"} for i in range(60)]
    full = {"method": deltaw.Full(), "lr": 0.003}
    told = " ".join(warnings_of(tmp_path / "run", records, epochs=40, **full))
    assert "learned by heart" in told and "--patience 2" in told and "Nothing was learned" not in told
    kept = " ".join(warnings_of(tmp_path / "kept", records, epochs=40, patience=2, **full))
    assert "learned by heart" not in kept


def test_an_adapter_that_was_trained_before_is_not_compared_with_its_start(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    model = byte_llama(tokenizer)
    data = DataConfig(template="plain")
    first = TrainConfig(out=str(tmp_path / "first"), samples=0, data=data, lr=0.02, steps=60)
    begun = deltaw.train(model, RECORDS, first, method=LoRA(rank=4), tokenizer=tokenizer)
    deltaw.detach(model)
    more = TrainConfig(out=str(tmp_path / "more"), samples=0, data=data, lr=1e-7, steps=5, start=str(begun.adapter))
    assert not deltaw.train(model, RECORDS, more, method=LoRA(rank=4), tokenizer=tokenizer).warnings
