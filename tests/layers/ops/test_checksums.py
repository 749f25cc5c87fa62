"""Checksums: two tensors with one differing bit, or two entries in another order, are told apart, in either way of reading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltaw.layers.ops.checksums import content_of, difference, stamp

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool]
WAYS: list[Any] = ["host", "device"]


def values(dtype: torch.dtype, count: int = 35) -> Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(1)) * 50).to(dtype).view(5, -1)


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_change_of_any_bit_or_place_is_seen(dtype: torch.dtype, by: Any) -> None:
    W = values(dtype)
    was = stamp(W, by)
    assert stamp(W.clone(), by) == was and difference(W.clone(), was) is None
    octets = W.clone().view(torch.uint8)
    for place in (0, 3, octets.numel() - 1):
        for bit in (0, 3, 7) if dtype != torch.bool else (0,):
            changed = octets.clone()
            changed.view(-1)[place] ^= 1 << bit
            assert difference(changed.view(dtype), was) == "its values have changed"
    for one, other in ((0, 1), (2, 30), (33, 34)):
        changed = W.clone().view(-1)
        changed[[one, other]] = changed[[other, one]]
        if not torch.equal(changed.view(torch.uint8), W.view(-1).view(torch.uint8)):
            assert difference(changed.view(W.shape), was)


@pytest.mark.parametrize("by", WAYS)
def test_other_shapes_and_dtypes_are_said_and_strides_are_not(by: Any) -> None:
    W = values(torch.float32)
    was = stamp(W, by)
    assert difference(W.t(), was) == "it is [7, 5] now, it was [5, 7]"
    assert difference(W.half(), was) == "it is float16 now, it was float32"
    assert difference(W.t().contiguous().t(), was) is None
    assert difference(W.flip(0), was) and stamp(-W, by) != was
    assert stamp(torch.tensor([0.0]), by) != stamp(torch.tensor([-0.0]), by)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=9), st.data())
def test_the_sum_of_a_device_tells_any_one_changed_word(words: list[int], data: Any) -> None:
    W = torch.tensor(words)
    was = stamp(W, "device")
    place = data.draw(st.integers(0, len(words) - 1))
    W[place] = data.draw(st.integers(-(2**63), 2**63 - 1).filter(lambda word: word != words[place]))
    assert difference(W, was)


def test_what_is_longer_than_a_piece_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.layers.ops import checksums

    W = values(torch.bfloat16, 5 * 1000)
    whole = content_of(W, torch.bfloat16), content_of(W, torch.float16)
    monkeypatch.setattr(checksums, "_PIECE", 64)
    monkeypatch.setattr(checksums, "_WORDS", 16)
    assert (content_of(W, torch.bfloat16), content_of(W, torch.float16)) == whole
    was = stamp(W, "device")
    for place in (0, 63, 64, 4999):
        changed = W.clone().view(-1)
        changed[place] += 1
        assert difference(changed.view(W.shape), was)


def test_values_are_rounded_to_nearest_from_any_dtype() -> None:
    exact = values(torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        assert content_of(exact.float(), dtype) == content_of(exact.float().to(dtype), dtype)
        assert content_of(exact, dtype) == content_of(exact.float(), dtype)
