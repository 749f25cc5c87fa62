"""The way back from a merged weight: its own bits, and the memory that it takes until then."""

import pytest
import torch

from deltaw.layers.ops.merging import Product, merge_
from deltaw.layers.ops.residual import Packed
from deltaw.layers.ops.undo import Copy, Correction, merge_correctably_

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_a_correction_gives_the_bits_back_of_what_was_merged(dtype: torch.dtype, turned: bool) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(3, 40), torch.randn(24, 3)
    W0, plain = torch.randn(24, 40).to(dtype), Product(A.clone(), B.clone(), 2.5)
    W, expected = W0.t().contiguous().t() if turned else W0.clone(), W0.clone()
    stats, correction = merge_correctably_(W, Product(A, B, 2.5))
    assert stats == merge_(expected, plain) and torch.equal(W, expected)
    A.zero_()  # as training goes on
    B.zero_()
    assert torch.equal(correction.restored(W), W0)
    assert torch.equal(W, expected)  # which is put back by whoever asked


def test_what_is_kept_is_counted_in_bytes() -> None:
    assert Copy(torch.zeros(5, 3, dtype=torch.bfloat16)).bytes == 5 * 3 * 2
    product = Product(torch.zeros(3, 40), torch.zeros(24, 3), 2.0)
    gaps, short = torch.zeros(13, dtype=torch.uint8), torch.zeros(11, dtype=torch.int8)
    correction = Correction(product, Packed(gaps, short, torch.zeros(7, dtype=torch.int64)))
    assert correction.bytes == 13 + 11 + 8 * 7 + 4 * 3 * 40 + 4 * 24 * 3


def test_a_copy_is_what_it_is_a_copy_of() -> None:
    W0 = torch.randn(5, 3)
    assert torch.equal(Copy(W0.clone()).restored(W0 + 1), W0)
