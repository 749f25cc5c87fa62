"""Flags and keys of other tools are answered by what they are here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltaw.cli.flags import COMMANDS, train_with
from deltaw.cli.main import main
from deltaw.cli.synonyms import _BY_NAME, _TABLE, answer
from deltaw.config import keys
from deltaw.methods.registry import METHODS

EVERY: set[str] = {key for command in COMMANDS.values() for key in keys(command)}
EVERY |= {key for method in METHODS for key in keys(train_with(method))}


def test_each_name_is_one_that_we_do_not_have_and_means_a_setting_that_we_have() -> None:
    names = [name for meaning in _TABLE for name in meaning.names.split()]
    assert len(names) == len(set(names)) > 400
    assert EVERY & set(names) == {"adapter", "test"}  # of other commands; train has neither
    assert not {*keys(train_with("lora"))} & set(names)
    assert {m.setting for m in _TABLE if m.setting} <= EVERY | {"MODEL", "DATA"}
    assert all(m.setting or m.note for m in _TABLE)


@pytest.mark.parametrize("name", sorted(_BY_NAME))
def test_train_answers_each(name: str) -> None:
    """But for a few that belong to other commands."""
    known = {*keys(train_with("lora")), "method", "MODEL", "DATA"}
    said = answer(name.replace("_", "-").upper(), known, "--{}".format)
    elsewhere = {"adapter", "max_new_tokens", "temperature", "beams", "metrics"}
    assert (
        said.startswith((": it is --", ": there is none; ", ": MODEL", ": DATA")) or _BY_NAME[name].setting in elsewhere
    )


def test_a_command_names_them_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = "train m d --learning-rate 1 --lora_r=8 --per-device-train-batch-size 2 --bf16 --load-in-4bit --base_model x --zzz"
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    for line in (
        "--learning-rate: it is --lr here", "--lora-r: it is --rank here", "--per-device-train-batch-size: it is --micro-batch",
        "--bf16: it is --dtype here", "--load-in-4bit: there is none; give as MODEL", "--base-model: MODEL stands by itself",
        "see deltaw train --help",
    ):  # fmt: skip
        assert line in said
    assert "unknown flag --zzz" in said


def test_another_command_answers_with_its_settings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "m", "a", "-o", "x", "--learning-rate", "1", "--torch-dtype", "float16"]) == 2
    said = capsys.readouterr().err
    assert "--torch-dtype: it is --dtype here" in said and "it is --lr" not in said
    assert "--lr is a flag of deltaw train, compare, sweep" in said


@pytest.mark.parametrize(("key", "meant"), [("learning_rate", "lr"), ("lora_alpha", "alpha"), ("base_model", "model")])
def test_a_yaml_file_is_answered_too(key: str, meant: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.yaml").write_text(f"data: x\n{key}: 1\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert f"unknown key '{key}': it is {meant} here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [("train m d -lr 1", "unknown flag -lr: it is --lr here"), ("train m d -r 8", "unknown flag -r: it is --rank here"),
     ("train m d -o x", "unknown flag -o: it is --out here"), ("train m d --LR 1", "unknown flag --LR: it is --lr here"),
     ("train m d --train.epochs 1", "it is --epochs here"), ("train m d --train.max_seq_length 1", "it is --max-length here"),
     ("train m d --temperature 1", "--temperature is a flag of deltaw generate, chat, eval"),
     ("train m d --n-predict 1", "--max-new-tokens is a flag of deltaw generate, chat, eval"),
     ("train m d --adapter qlora", "it is --method here"), ("eval m d --learning-rate 1", "--lr is a flag of deltaw train, compare, sweep"),
     ("finetune m d", "it is train here"), ("fuse m a", "it is merge here")],
)  # fmt: skip
def test_other_ways_to_write_a_flag_or_a_command(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One dash, capitals, litgpt's groups, flags of other commands, commands of other tools."""
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", ["train m d --clip -1 --workers 2", "train m d --system -x --zzz 1"])
def test_what_is_like_nothing_gets_no_guess_and_values_may_begin_with_a_dash(words: str, capsys: Any) -> None:
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.count("unknown flag") == 1 and "did you mean" not in said
