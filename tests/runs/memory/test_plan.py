"""Plans from shapes alone: the paper's counts, and the parts that must add up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers

import deltaw
from deltaw.errors import ConfigError, FileError
from deltaw.runs.memory.presets import PRESETS
from tests.conftest import tiny_gpt2, tiny_llama

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
def test_parameters_are_the_papers_counts(preset: str, rank: int, parameters: int) -> None:
    with torch.device("meta"):
        model = _model(preset)
        deltaw.attach(model, deltaw.LoRA(rank=rank, targets="qv"))
    adapter = deltaw.summary(model).adapters["default"]
    assert adapter.parameters == parameters and adapter.bytes == 4 * parameters


def _model(preset: str) -> Any:
    kind = transformers.AutoModelForMaskedLM if "roberta" in preset else transformers.AutoModelForCausalLM
    return kind.from_config(PRESETS[preset].config())


@pytest.mark.slow
def test_gpt3s_checkpoint_and_adams_state_are_the_papers() -> None:
    """Section 4.2: 175B parameters, 350 GB in 16 bits. Adam's moments alone are 1.4 TB in full precision."""
    config = deltaw.PlanConfig(methods="full,lora(rank=1,targets=qv)", batch=1, length=64, dtype="float16")
    planned = deltaw.plan("gpt3-175b", config)
    full, lora = planned.rows
    assert planned.base_bytes == pytest.approx(350e9, rel=0.01)
    assert full.memory.optimizer == pytest.approx(1.4e12, rel=0.01)
    assert lora.parameters == 4_718_592 and lora.adapter_bytes == 18_874_368
    assert lora.memory.optimizer < 1e8 and lora.memory.weights == pytest.approx(350e9, rel=0.01)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_parts_are_the_models(make: Any) -> None:
    model = make(layers=1)
    count = sum(p.numel() for p in model.parameters())
    planned = deltaw.plan(model.config, SMALL)
    lora, full = planned.rows
    deltaw.attach(model, deltaw.LoRA())
    assert lora.parameters == deltaw.summary(model).adapters["default"].parameters
    assert planned.base_parameters == full.parameters == count and planned.base_bytes == 4 * count
    assert full.memory.optimizer == pytest.approx(8 * count, rel=0.01) and full.memory.gradients >= 4 * count
    assert lora.memory.total < full.memory.total
    assert lora.kept_checkpointed is not None and lora.kept_checkpointed < lora.kept
    # A forward is 2 FLOPs a weight and token, a backward 4, without the weights' gradients 2; the rest is attention's
    weights = count - model.get_input_embeddings().weight.numel()
    for row, times in ((lora, 4), (full, 6)):
        assert row.flops_per_token is not None and row.flops_per_token > 0.5 * times * weights


def test_rows_of_an_image_model_are_images_of_its_size() -> None:
    config = transformers.ViTConfig(image_size=[16, 24], patch_size=8, num_channels=1, **SIZES)
    planned = deltaw.plan(config, deltaw.PlanConfig(methods="lora", batch=2, device="cpu", dtype="float32", labels=3))
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**config.to_dict() | {"num_labels": 3}))
    deltaw.attach(model, deltaw.LoRA(whole="classifier"))
    (lora,) = planned.rows
    assert (planned.task, planned.length) == ("image", None)
    assert lora.parameters == deltaw.summary(model).adapters["default"].parameters
    # 7 positions: 6 patches, and the class's. At least a forward's and half of a backward's products with each weight
    weights = sum(p.numel() for n, p in model.named_parameters() if "layer" in n and n.endswith("weight"))
    assert lora.flops_per_token is not None and 4 * 7 * 0.8 * weights < lora.flops_per_token < 4 * 7 * 2 * weights


@pytest.mark.parametrize(
    ("config", "task", "length"),
    [
        (transformers.BertConfig(max_position_embeddings=40, **SIZES), "classification", 40),
        (transformers.LlamaConfig(max_position_embeddings=4096, **SIZES), "causal", 512),
        (transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4), "seq2seq", 512),
        (transformers.ViTConfig(image_size=16, patch_size=8, **SIZES), "image", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, transformers.PreTrainedConfig) else str(value),
)
def test_the_model_decides_task_and_length_where_they_are_not_given(config: Any, task: str, length: int | None) -> None:
    planned = deltaw.plan(config, deltaw.PlanConfig(methods="lora", batch=1, device="cpu"))
    assert (planned.task, planned.length) == (task, length)
    assert not any(row.memory.estimated for row in planned.rows)


def test_a_mask_that_needs_gradients_is_planned_without_an_estimate() -> None:
    """T5's position bias is trained, or passes gradients on to checkpointed blocks."""
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    planned = deltaw.plan(config, deltaw.PlanConfig(methods="full", batch=1, length=16, device="cpu"))
    assert not planned.rows[0].memory.estimated and planned.rows[0].kept_checkpointed is not None


def test_a_head_has_an_output_for_each_class_and_one_for_a_quantity() -> None:
    bert = transformers.BertConfig(**SIZES)
    one, five = (
        deltaw.plan(bert, deltaw.PlanConfig(methods="lora", task=task, labels=5, length=8, device="cpu")).rows[0]
        for task in ("regression", "classification")
    )
    assert five.parameters - one.parameters == 4 * (32 + 1)


def test_flops_grow_by_six_a_trained_parameter_and_token() -> None:
    """2 in the forward pass, 2 for the gradient of the input and 2 for its own: a larger rank costs what its parameters do."""
    methods = {str(rank): deltaw.LoRA(rank=rank, targets="mlp") for rank in (2, 4)}
    small, large = deltaw.plan(tiny_llama(layers=1).config, SMALL, methods).rows
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


def test_methods_that_do_not_fit_are_named_and_the_others_planned() -> None:
    config = dataclasses.replace(SMALL, methods="bitfit,lora(targets=nothing)")
    planned = deltaw.plan(tiny_llama(layers=1).config, config)
    assert [row.name for row in planned.rows] == ["bitfit"] and "biases" in planned.rows[0].note
    assert list(planned.failed) == ["lora(targets=nothing)"]


def test_an_unknown_model_and_too_long_rows_are_refused() -> None:
    with pytest.raises(FileError, match="roberta-base"):
        deltaw.plan("roberta-bass", SMALL)
    with pytest.raises(ConfigError, match="128 positions"):
        deltaw.plan(tiny_gpt2(layers=1).config, dataclasses.replace(SMALL, length=200))


def test_dropout_is_planned_from_shapes_too() -> None:
    """Its masks have no generator on a device without memory."""
    methods = {str(p): deltaw.LoRA(rank=2, targets="qv", dropout=p) for p in (0.0, 0.3)}
    without, dropped = (row.memory for row in deltaw.plan(tiny_llama(layers=1).config, SMALL, methods).rows)
    assert not dropped.estimated and dropped.activations >= without.activations


def test_each_methods_coverage_is_in_its_row() -> None:
    methods = {"lora": deltaw.LoRA(), "prefix": deltaw.Prefix(where="embedding")}
    lora, prefix = deltaw.plan(tiny_llama(tied=False, layers=1).config, SMALL, methods).rows
    assert lora.coverage[0].startswith("7 of 8 dense layers take an update (q 1, k 1, v 1")
    assert lora.coverage[1] == "Left out: lm_head (output head)."
    assert prefix.coverage == ()
