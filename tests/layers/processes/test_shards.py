"""Models whose weights are dealt out over processes: saved, loaded and merged as in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw.errors import FileError
from deltaw.layers.processes.shards import blocks_of, full, is_dealt, ranks_of, whole
from deltaw.model.summary import updates
from tests.conftest import ROOT, tiny_gpt2, tiny_llama
from tests.layers.processes.conftest import ended, start


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case → what two processes, or three, found to be so."""
    folder = tmp_path_factory.mktemp("dealt")
    outcomes = ended(start(request.param, ["-m", "tests.layers.processes.dealt", str(folder)], ROOT))
    assert all(code == 0 for code, _, _ in outcomes), outcomes
    result: dict[str, Any] = json.loads(outcomes[0][1])
    return result


def test_a_model_that_is_dealt_out_is_saved_loaded_and_merged_as_in_one_process(outcome: dict[str, Any]) -> None:
    wrong = {
        case: [what for what, so in found.items() if not so] for case, found in outcome.items() if case != "refused"
    }
    assert len(wrong) == 18 and not any(wrong.values()), wrong


def test_what_cannot_be_done_on_it_is_refused(outcome: dict[str, Any]) -> None:
    assert "attach first, then call fully_shard" in outcome["refused"]["attach"]
    assert "cannot be untied" in outcome["refused"]["untie"]


def test_an_adapter_that_is_not_whole_here_is_not_saved(tmp_path: Path) -> None:
    """As engines leave one that deal weights out in ways of their own: 40 bytes were written for it."""
    model = deltaw.attach(tiny_llama(), deltaw.LoRA(rank=2, targets="q"))
    (name, update), *_ = updates(model).items()
    update.A = nn.Parameter(torch.empty(0))
    with pytest.raises(FileError, match=rf"not hold the adapter whole(.|\n)*{name}: A(.|\n)*GatheredParameters"):
        deltaw.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_model_in_one_process_is_whole() -> None:
    model = tiny_llama()
    before = dict(model.named_parameters())
    with whole(model):
        assert all(p is before[name] and full(p) is p for name, p in model.named_parameters())
    assert not is_dealt(model) and ranks_of(model).count == 1


@pytest.mark.parametrize("made", [tiny_llama, tiny_gpt2])
def test_blocks_are_those_of_the_outermost_list(made: Any) -> None:
    model = made(layers=3)
    blocks = blocks_of(model)
    assert len(blocks) == 3 and {type(block).__name__ for block in blocks} <= {"LlamaDecoderLayer", "GPT2Block"}


def test_stacks_of_encoder_and_decoder_are_both_dealt_out() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=32))
    assert [type(block).__name__ for block in blocks_of(model)] == ["T5Block"] * 4
    assert not blocks_of(nn.Sequential(nn.Linear(2, 2)))
