"""Merging and unmerging again and again: not one bit of the base differs after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaw import LoRA, attach, merge, unmerge
from tests.conftest import bits, fill, tiny_gpt2, tiny_llama

KINDS = {
    "llama": (lambda: tiny_llama(tied=False), "all-linear"),  # dense layers without biases
    "gpt2": (tiny_gpt2, "all-linear"),  # Conv1D, stored transposed, with biases
    "tied": (tiny_llama, "embed_tokens,q_proj"),  # an embedding whose weight is the head's
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_thirty_cycles_of_two_adapters_and_both_ways_back_change_no_bit(kind: str, dtype: torch.dtype) -> None:
    make, targets = KINDS[kind]
    torch.manual_seed(0)
    model: Any = make().to(dtype).eval()
    before = bits(model)
    fill(attach(model, LoRA(rank=4, alpha=10, targets=targets), name="a"), "a", seed=1)
    fill(attach(model, LoRA(rank=2, alpha=7, targets=targets), name="b"), "b", seed=2)
    merged: dict[str, dict[str, torch.Tensor]] = {}
    for number in range(30):
        name = "ab"[number % 2]
        merge(model, name, keep="correction" if number % 3 == 0 else "copy", untie=True)
        now = bits(model)
        first = merged.setdefault(name, now)
        assert all(torch.equal(now[n], v) for n, v in first.items())
        assert any(not torch.equal(now[n], v) for n, v in before.items())
        unmerge(model)
    after = bits(model)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].view(integers), v.view(integers)) for n, v in before.items())
