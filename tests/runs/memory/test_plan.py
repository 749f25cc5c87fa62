"""What training would take, from shapes alone: the paper's counts, and the parts that must add up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import deltaw
from deltaw.cli.main import main
from deltaw.errors import ConfigError, FileError
from deltaw.files.units import parse_size
from deltaw.runs.memory import machine
from deltaw.runs.memory.parts import largest
from deltaw.runs.memory.presets import PRESETS
from tests.conftest import byte_llama, tiny_gpt2, tiny_llama
from tests.data.conftest import CHATML, tiny_tokenizer
from tests.runs.conftest import RECORDS

SMALL = deltaw.PlanConfig(methods="lora,full", batch=2, length=32, dtype="float32", device="cpu")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


# Table 4 (GPT-3 r = 1 on q, v), Table 2 (RoBERTa base r = 8), Table 3 (GPT-2 M and L r = 4) of the paper
@pytest.mark.parametrize(
    ("preset", "rank", "parameters"),
    [
        ("gpt3-175b", 1, 4_718_592),
        ("roberta-base", 8, 294_912),
        ("gpt2-medium", 4, 393_216),
        ("gpt2-large", 4, 737_280),
    ],
)
def test_the_papers_counts(preset: str, rank: int, parameters: int) -> None:
    with torch.device("meta"):
        model = _model(preset)
        deltaw.attach(model, deltaw.LoRA(rank=rank, targets="qv"))
    own = deltaw.summary(model).adapters["default"]
    assert own.parameters == parameters and own.bytes == 4 * parameters


def _model(preset: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    kind = AutoModelForMaskedLM if "roberta" in preset else AutoModelForCausalLM
    return kind.from_config(PRESETS[preset].config())


@pytest.mark.slow
def test_gpt3s_checkpoint_and_adams_state() -> None:
    """Section 4.2: 175B parameters, 350 GB in 16 bits. Adam's moments alone are 1.4 TB in full precision."""
    config = deltaw.PlanConfig(methods="full,lora(rank=1,targets=qv)", batch=1, length=64, dtype="float16")
    found = deltaw.plan("gpt3-175b", config)
    full, lora = found.rows
    assert found.base_bytes == pytest.approx(350e9, rel=0.01)
    assert full.memory.optimizer == pytest.approx(1.4e12, rel=0.01)
    assert lora.parameters == 4_718_592 and lora.adapter_bytes == 18_874_368
    assert lora.memory.optimizer < 1e8 and lora.memory.weights == pytest.approx(350e9, rel=0.01)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_parts_are_those_of_the_model(make: Any) -> None:
    model = make()
    count = sum(p.numel() for p in model.parameters())
    found = deltaw.plan(model.config, SMALL)
    lora, full = found.rows
    deltaw.attach(model, deltaw.LoRA())
    assert lora.parameters == deltaw.summary(model).adapters["default"].parameters
    assert found.base_parameters == full.parameters == count and found.base_bytes == 4 * count
    assert full.memory.optimizer == pytest.approx(8 * count, rel=0.01) and full.memory.gradients >= 4 * count
    assert lora.memory.total < full.memory.total
    assert lora.kept_checkpointed is not None and lora.kept_checkpointed < lora.kept
    # A forward is 2 FLOPs a weight and token, a backward 4, without the weights' gradients 2; the rest is attention's
    weights = count - model.get_input_embeddings().weight.numel()
    for row, times in ((lora, 4), (full, 6)):
        assert row.flops_per_token is not None and row.flops_per_token > 0.5 * times * weights


def test_models_of_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Rows are images of the model's own size: nothing is asked about tokens."""
    config = transformers.ViTConfig(image_size=[16, 24], patch_size=8, num_channels=1, **SIZES)
    found = deltaw.plan(
        config, deltaw.PlanConfig(methods="lora,full", batch=2, device="cpu", dtype="float32", labels=3)
    )
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**config.to_dict() | {"num_labels": 3}))
    deltaw.attach(model, deltaw.LoRA(whole="classifier"))
    lora = found.rows[0]
    assert (found.task, found.length) == ("image", None)
    assert lora.parameters == deltaw.summary(model).adapters["default"].parameters
    # 7 positions: 6 patches, and the class's. At least a forward's and half of a backward's products with each weight
    weights = sum(p.numel() for n, p in model.named_parameters() if "layer" in n and n.endswith("weight"))
    assert lora.flops_per_token is not None and 4 * 7 * 0.8 * weights < lora.flops_per_token < 4 * 7 * 2 * weights
    config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--methods", "lora", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "image, batches of 8 images" in said and "FLOPs/image" in said


def test_the_task_and_the_length_where_they_are_not_given() -> None:
    found = {
        type(config).__name__: deltaw.plan(config, deltaw.PlanConfig(methods="lora", batch=1, device="cpu"))
        for config in (
            transformers.BertConfig(max_position_embeddings=40, **SIZES),
            transformers.LlamaConfig(max_position_embeddings=4096, **SIZES),
            transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4),
            transformers.ViTConfig(image_size=16, patch_size=8, **SIZES),
        )
    }
    assert {name: (each.task, each.length) for name, each in found.items()} == {
        "BertConfig": ("classification", 40), "LlamaConfig": ("causal", 512), "T5Config": ("seq2seq", 512),
        "ViTConfig": ("image", None),
    }  # fmt: skip
    assert not any(row.memory.estimated for each in found.values() for row in each.rows)
    asked = deltaw.PlanConfig(methods="lora", task="regression", labels=5, length=8, device="cpu")
    bert = transformers.BertConfig(**SIZES)
    one, five = (
        deltaw.plan(bert, dataclasses.replace(asked, task=t)).rows[0] for t in ("regression", "classification")
    )
    assert five.parameters - one.parameters == 4 * (32 + 1)


def test_flops_are_counted_one_by_one() -> None:
    """4 a frozen weight and token (forward, and the gradient of the input), 6 a parameter of A and B, none besides: a rank more
    costs what its parameters do."""
    config = tiny_llama().config
    methods = "lora(rank=2),lora(rank=4)"
    small, large = deltaw.plan(config, dataclasses.replace(SMALL, methods=methods)).rows
    assert small.flops_per_token is not None and large.flops_per_token is not None
    more = large.parameters - small.parameters
    assert large.flops_per_token - small.flops_per_token == pytest.approx(6 * more, rel=0.1)


@pytest.mark.slow
def test_activations_grow_with_rows_and_memory_says_how_many_fit() -> None:
    config = tiny_llama().config
    small = dataclasses.replace(SMALL, device="cuda")  # a CPU's process is measured, and these tests' grows meanwhile
    one, two = (deltaw.plan(config, dataclasses.replace(small, batch=n)).rows[0] for n in (2, 4))
    assert two.kept == pytest.approx(2 * one.kept, rel=0.1)
    room = one.memory.total + 5 * (two.memory.total - one.memory.total)
    row = deltaw.plan(config, dataclasses.replace(small, memory=f"{room}B")).rows[0]
    assert row.largest_batch is not None and 8 <= row.largest_batch <= 14
    assert deltaw.plan(config, dataclasses.replace(small, memory="1kB")).rows[0].largest_batch == 0


@pytest.mark.parametrize("most", [0, 1, 2, 37, 1000])
def test_the_largest_that_fits(most: int) -> None:
    asked: list[int] = []

    def needed(rows: int) -> int:
        asked.append(rows)
        return 1000 + 7 * rows + rows % 3

    assert largest(needed, 1000 + 7 * most + 2) == most
    assert len(asked) < 24


def test_sizes_as_people_write_them() -> None:
    assert [parse_size(t, "x") for t in ("16GB", "16 GiB", "900MB", "1.5k", "12")] == [
        16 * 10**9, 16 * 2**30, 9 * 10**8, 1500, 12
    ]  # fmt: skip
    for wrong in ("", "GB", "0", "-1GB", "1XB", "1e9"):
        with pytest.raises(ConfigError, match="x is"):
            parse_size(wrong, "x")


def test_methods_that_do_not_fit_are_said_and_the_others_planned() -> None:
    found = deltaw.plan(tiny_llama().config, dataclasses.replace(SMALL, methods="bitfit,lora,lora(targets=nothing)"))
    assert [row.name for row in found.rows] == ["bitfit", "lora"] and "biases" in found.rows[0].note
    assert list(found.failed) == ["lora(targets=nothing)"]


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(FileError, match="roberta-base"):
        deltaw.plan("roberta-bass", SMALL)
    with pytest.raises(ConfigError, match="128 positions"):
        deltaw.plan(tiny_gpt2().config, dataclasses.replace(SMALL, length=200))


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "roberta-base", "--length", "64", "--device", "cpu", "--methods"]
    assert main([*words, "lora-qv", "--memory", "4GB"]) == 0
    said = capsys.readouterr().out
    assert "Training memory" in said and "rows in 4GB" in said and "peak" in said
    assert main([*words, "lora-qv", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["parameters"] > 294_912 and rows[0]["memory"]["total"] > 0  # with the classifier's head


@pytest.mark.parametrize("room", [None, 1000])
def test_training_says_its_memory_and_warns(room: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    if room is not None:
        monkeypatch.setattr(machine, "free", lambda device: room)
    tokenizer = tiny_tokenizer(CHATML)
    config = deltaw.TrainConfig(out=str(tmp_path / "run"), steps=2, batch=2, samples=0, device="cpu", dtype="float32")
    deltaw.train(byte_llama(tokenizer), RECORDS, config, tokenizer=tokenizer, on_event=heard.append)
    (start,) = [e for e in heard if e.kind == "start"]
    parts = dict(start.expected_memory)
    total, _ = parts.pop("total"), parts.pop("logits")  # which is part of what is at work
    assert total == sum(parts.values()) and parts["optimizer"] == pytest.approx(8 * start.parameters, rel=0.05)
    warned = [e.text for e in heard if e.kind == "warning" and "may run out of memory" in e.text]
    assert len(warned) == (room is not None)


def test_dropout_is_planned_from_shapes_too() -> None:
    """Its masks have no generator on a device without memory."""
    config = transformers.LlamaConfig(max_position_embeddings=64, **SIZES)
    found = deltaw.plan(config, deltaw.PlanConfig(methods="lora,lora(dropout=0.3)", batch=1, device="cpu"))
    without, dropped = (row.memory for row in found.rows)
    assert not dropped.estimated and dropped.activations >= without.activations


def test_the_coverage_of_each_method() -> None:
    found = deltaw.plan(tiny_llama(tied=False).config, dataclasses.replace(SMALL, methods="lora,prefix"))
    lora, prefix = found.rows
    assert lora.coverage[0].startswith("14 of 15 dense layers take an update (q 2, k 2, v 2")
    assert lora.coverage[1] == "Left out: lm_head (output head)."
    assert prefix.coverage == ()
