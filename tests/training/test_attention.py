"""The attention of a training run: switched only where it pays, the same values, and switched back."""

from __future__ import annotations

import pytest
import torch

from deltaw.training.attention import short_row_attention
from tests.conftest import tiny_llama


@pytest.mark.parametrize(
    ("dtype", "longest", "inside"),
    [(torch.bfloat16, 128, "eager"), (torch.bfloat16, 129, "sdpa"), (torch.float32, 10, "sdpa")],
)
def test_only_short_rows_in_bfloat16_use_plain_products(dtype: torch.dtype, longest: int, inside: str) -> None:
    model = tiny_llama().to(dtype)
    model.set_attn_implementation("sdpa")
    with pytest.raises(KeyboardInterrupt), short_row_attention(model, longest):
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
        with short_row_attention(model, ids.shape[1]):
            switched = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(switched, plain, atol=0.02, rtol=0.02)
