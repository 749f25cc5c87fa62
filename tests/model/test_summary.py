"""Sizes of adapters, and which layers they change: in summary and in the log of attach."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import deltaw
from deltaw import BitFit, LoRA, Prefix, attach
from tests import architectures
from tests.conftest import fill, tiny_llama


def test_coverage_has_roles_counts_and_reasons() -> None:
    model = deltaw.attach(tiny_llama(tied=False), LoRA(rank=2, targets="attention"))
    coverage = deltaw.summary(model).adapters["default"].coverage
    assert coverage.roles == {"q": 2, "k": 2, "v": 2, "o": 2}
    assert len(coverage.adapted) == 8 and coverage.dense == 15
    assert coverage.reasons["output head"] == ["lm_head"]
    assert len(coverage.reasons["not among the targets"]) == 6
    assert coverage.lines() == [
        "8 of 15 dense layers take an update (q 2, k 2, v 2, o 2).",
        "Left out: 2 mlp.down_proj, 2 mlp.gate_proj, 2 mlp.up_proj (not among the targets); lm_head (output head).",
        "Only where they are named: model.embed_tokens.",
    ]


def test_an_encoders_and_a_decoders_layers_of_one_name_are_said_once() -> None:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    coverage = (
        deltaw.summary(deltaw.attach(T5ForConditionalGeneration(T5Config(**sizes)), LoRA(rank=2)))
        .adapters["default"]
        .coverage
    )
    (said,) = [line for line in coverage.lines() if line.startswith("Only where")]
    assert said.count("relative_attention_bias") == 1 and "2 SelfAttention.relative_attention_bias" in said


def test_weights_without_a_layer_count_by_their_own_names() -> None:
    model = MixtralForCausalLM(MixtralConfig(**architectures.WIDE, num_local_experts=4, num_experts_per_tok=2))
    coverage = deltaw.summary(deltaw.attach(model, LoRA(rank=2))).adapters["default"].coverage
    assert coverage.roles == {"q": 2, "k": 2, "v": 2, "o": 2, "gate_up": 2, "down": 2}
    assert "model.layers.0.mlp.experts.gate_up_proj" in coverage.adapted
    assert all("experts" not in name for name in coverage.left_out)


def test_coverage_is_logged_once_at_attach(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="deltaw.coverage"):
        deltaw.attach(tiny_llama(), LoRA(rank=2), name="mine")
    said = [r.getMessage() for r in caplog.records if "dense layers" in r.getMessage()]
    assert said == [
        "Adapter 'mine': 14 of 15 dense layers take an update (q 2, k 2, v 2, o 2, gate 2, up 2, down 2). "
        "Left out: lm_head (output head). Only where they are named: model.embed_tokens."
    ]


def test_a_loaded_adapter_says_what_it_reached(tmp_path: Path) -> None:
    model = fill(deltaw.attach(tiny_llama(), LoRA(rank=2, targets="q,v")))
    deltaw.save(model, tmp_path / "a")
    other = tiny_llama()
    deltaw.load(other, tmp_path / "a", check_base=False)
    adapter = deltaw.summary(other).adapters["default"]
    assert adapter.layers == 4 and adapter.zero == 0
    assert adapter.coverage.roles == {"q": 2, "v": 2} and adapter.coverage.dense == 15
    assert adapter.left_out["model.layers.1.mlp.up_proj"] == "not among the targets"


def test_updates_that_are_on_no_dense_layer_have_no_lines() -> None:
    model = deltaw.attach(tiny_llama(), Prefix(length=2))
    assert deltaw.summary(model).adapters["default"].coverage.lines() == []
    biased = deltaw.attach(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)), BitFit())
    coverage = deltaw.summary(biased).adapters["default"].coverage
    assert coverage.adapted == ("0",) and list(coverage.left_out) == ["1"]


def test_a_head_inside_another_model_is_left_out() -> None:
    class Caption(nn.Module):
        """A model with a language model inside, whose head has the embedding's weight."""

        def __init__(self) -> None:
            super().__init__()
            self.see, self.say = nn.Linear(7, 32), tiny_llama(tied=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.say(inputs_embeds=self.see(x)).logits
            return out

    model = deltaw.attach(Caption(), LoRA(rank=2))
    coverage = deltaw.summary(model).adapters["default"].coverage
    assert coverage.left_out["say.lm_head"] == "output head" and "see" in coverage.adapted
    deltaw.merge(fill(model))


def test_a_summary_counts_layers_parameters_and_bytes() -> None:
    model = attach(tiny_llama(), LoRA(rank=4, targets="qv"))
    summary = deltaw.summary(model)
    adapter = summary.adapters["default"]
    assert adapter.layers == 4 and summary.active == "default"
    assert adapter.parameters == 2 * (4 * (32 + 32) + 4 * (32 + 16)) == sum(p.numel() for p in deltaw.parameters(model))
    assert summary.base_parameters == sum(p.numel() for p in tiny_llama().parameters())
    assert adapter.bytes == adapter.parameters * 4
    assert repr(deltaw.adapters(model)) == "('default'*)"


def roberta_base() -> Any:
    with torch.device("meta"):
        return RobertaModel(RobertaConfig())


def gpt3() -> Any:
    """The dense layers of its attention: 96 blocks, d = 12,288."""
    return nn.ModuleList(
        nn.ModuleDict(
            {name: nn.Linear(12288, 12288, device="meta") for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        )
        for _ in range(96)
    )


@pytest.mark.parametrize(("make", "rank", "count"), [(roberta_base, 8, 294_912), (gpt3, 1, 4_718_592)])
def test_parameter_counts_are_the_papers(make: Any, rank: int, count: int) -> None:
    model = attach(make(), LoRA(rank=rank, alpha=16, targets="qv"))
    assert deltaw.summary(model).adapters["default"].parameters == count
