"""Adapters that real PEFT refuses: said at save and in the card, for exactly those, and deltaw loads them."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import deltaw
from deltaw.files.formats.peft.metadata import REFUSED
from tests.conftest import fill, tiny_gpt2, tiny_llama

peft = pytest.importorskip("peft")


class Grouped(nn.Module):
    """A convolution in groups, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.outer = nn.Conv1d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.outer(self.inner(x))


class Attention(nn.Module):
    """PyTorch's own attention over an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.embed(x)
        return self.attention(h, h, h)[0]


def mamba() -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=50)
    )


def mamba2() -> Any:
    config = transformers.Mamba2Config(
        hidden_size=32, state_size=8, num_heads=8, head_dim=8, expand=2, n_groups=2, num_hidden_layers=1, vocab_size=50
    )
    return transformers.Mamba2ForCausalLM(config)


def falcon_mamba() -> Any:
    config = transformers.FalconMambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=50)
    return transformers.FalconMambaForCausalLM(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=50,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


CASES = {
    "llama": (tiny_llama, {}), "gpt2": (tiny_gpt2, {}), "experts": (mixtral, {}), "attention": (Attention, {"targets": "*"}),
    "mamba": (mamba, {}), "mamba in_proj": (mamba, {"targets": "in_proj"}), "mamba conv1d": (mamba, {"targets": "conv1d"}),
    "mamba2": (mamba2, {}), "falcon mamba": (falcon_mamba, {}), "groups": (Grouped, {"targets": "*"}),
    "groups, rank 3": (Grouped, {"targets": "inner", "rank": 3}), "no groups": (Grouped, {"targets": "outer"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_peft_refuses_is_said_and_nothing_else(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, settings = CASES[case]
    torch.manual_seed(0)
    base = make().eval()
    model = fill(deltaw.attach(copy.deepcopy(base), deltaw.LoRA(**{"rank": 4, "alpha": 6, **settings})))
    with caplog.at_level(logging.WARNING, logger="deltaw"):
        folder = deltaw.save(model, tmp_path / "a")
    said = [record.getMessage() for record in caplog.records if "will refuse" in record.getMessage()]
    try:
        peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        refused = False
    except (ValueError, RuntimeError):
        refused = True
    card = (folder / "README.md").read_text()
    assert bool(said) == refused == ("does not load it" in card) and refused != ("PeftModel.from_pretrained" in card)
    if refused:
        layers = [n for names in json.loads(deltaw.files.store.read(folder).metadata[REFUSED]).values() for n in names]
        assert layers and len(said) == 1 and all(layer in said[0] + card for layer in layers[:2])
        assert 'library_name: "deltaw"' in card
    again = copy.deepcopy(base)
    deltaw.load(again, folder)
    for layer in deltaw.model.summary.updates(model, "default"):
        if hasattr(base.get_submodule(layer), "weight"):
            torch.testing.assert_close(deltaw.delta(again, layer), deltaw.delta(model, layer))


def test_a_prompt_for_a_model_without_attention_opens_in_peft(tmp_path: Path) -> None:
    """PEFT wants a number of heads, and computes nothing with it."""
    base = falcon_mamba().eval()
    model = deltaw.attach(copy.deepcopy(base), deltaw.Prefix(length=3, where="embedding"))
    folder = deltaw.save(model, tmp_path / "a")
    assert peft.PeftModel.from_pretrained(copy.deepcopy(base), folder) is not None
