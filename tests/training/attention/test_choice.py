"""The attention of a training run: switched only where it pays, the same values, and switched back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, MistralConfig, MistralForCausalLM

from deltaw.training.attention import choice, takes_trees, training_attention, without_trees
from tests.conftest import tiny_gpt2, tiny_llama


def windowed() -> Any:
    config = MistralConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=96, sliding_window=3,
    )  # fmt: skip
    return MistralForCausalLM(config)


def encoder() -> Any:
    config = BertConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config)


@pytest.mark.parametrize(
    ("dtype", "longest", "trees", "inside"),
    [
        (torch.bfloat16, 128, False, choice._SHORT_ROWS),
        (torch.bfloat16, 128, True, choice._SHORT_TREES),
        (torch.bfloat16, 129, True, choice._TREES),
        (torch.float32, 10, True, choice._TREES),
        (torch.bfloat16, 129, False, "sdpa"),
        (torch.float32, 10, False, "sdpa"),
    ],
)
def test_only_short_rows_in_bfloat16_use_plain_products(
    dtype: torch.dtype, longest: int, trees: bool, inside: str
) -> None:
    model = tiny_llama().to(dtype)
    model.set_attn_implementation("sdpa")
    with pytest.raises(KeyboardInterrupt), training_attention(model, longest, trees=trees):
        assert model.config._attn_implementation == inside
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"


def test_both_ways_give_the_same_logits_with_padding(ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = tiny_llama().to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits[mask.bool()]
        with training_attention(model, ids.shape[1]):
            switched = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(switched, plain, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, windowed, encoder])
@pytest.mark.parametrize("padding", [0, 4])
def test_it_is_the_models_own_attention(make: Callable[[], Any], padding: int, ids: torch.Tensor) -> None:
    """Values and gradients, for grouped and plain heads, sliding windows, and an encoder, which sees what follows."""
    torch.manual_seed(1)
    model = make().double().eval()
    mask = torch.ones_like(ids)
    mask[0, len(ids[0]) - padding :] = 0
    outcomes = []
    for name in ("sdpa", choice._SHORT_ROWS, choice._TREES, choice._SHORT_TREES):
        model.set_attn_implementation(name)
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        slopes = torch.autograd.grad(
            logits.pow(2).sum(), list(model.parameters()), materialize_grads=True, allow_unused=True
        )
        outcomes.append((logits, slopes))
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0])


def test_without_trees_it_is_the_same_attention_otherwise() -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    for longest, inside in ((128, choice._SHORT_ROWS), (129, "sdpa")):
        with training_attention(model, longest):
            with without_trees(model):
                assert model.config._attn_implementation == inside and not takes_trees(model)
            assert takes_trees(model)
    with without_trees(model):
        assert model.config._attn_implementation == "sdpa"
