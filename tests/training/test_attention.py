"""The attention of a training run: switched only where it pays, the same values, and switched back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, MistralConfig, MistralForCausalLM

from deltaw.training import attention
from deltaw.training.attention import training_attention
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
    ("dtype", "longest", "inside"),
    [(torch.bfloat16, 128, attention._NAME), (torch.bfloat16, 129, "sdpa"), (torch.float32, 10, "sdpa")],
)
def test_only_short_rows_in_bfloat16_use_plain_products(dtype: torch.dtype, longest: int, inside: str) -> None:
    model = tiny_llama().to(dtype)
    model.set_attn_implementation("sdpa")
    with pytest.raises(KeyboardInterrupt), training_attention(model, longest):
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
    found = []
    for name in ("sdpa", attention._NAME):
        model.set_attn_implementation(name)
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        found.append(
            (
                logits,
                torch.autograd.grad(
                    logits.pow(2).sum(), list(model.parameters()), materialize_grads=True, allow_unused=True
                ),
            )
        )
    torch.testing.assert_close(found[1], found[0])
