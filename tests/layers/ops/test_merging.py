"""ΔW maths: the one arithmetic, merge statistics, norms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.layers.ops import merging


def delta(A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    return merging.dense(merging.Product(A, B, scale), torch.empty(B.shape[0], A.shape[1]))


def by_hand(A: np.ndarray, B: np.ndarray, scale: float) -> np.ndarray:
    """The design's arithmetic spelled out in numpy: every product and every sum is one rounded fp32 operation."""
    dW = np.zeros((B.shape[0], A.shape[1]), np.float32)
    for i in range(A.shape[0]):
        t = (np.float32(scale) * B[:, i]).astype(np.float32)
        dW = (dW + (t[:, None] * A[i][None, :]).astype(np.float32)).astype(np.float32)
    return dW


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 70), k=st.integers(1, 70), r=st.integers(1, 9),
    scale=st.floats(0.01, 64).filter(lambda s: s != 1), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_delta_is_the_one_arithmetic_bit_for_bit(d: int, k: int, r: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((r, k)).astype(np.float32), rng.standard_normal((d, r)).astype(np.float32)
    assert np.array_equal(delta(torch.from_numpy(A), torch.from_numpy(B), scale).numpy(), by_hand(A, B, scale))


@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
def test_blocks_and_threads_change_no_bit(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    A, B = torch.randn(5, 130), torch.randn(210, 5)
    expected = delta(A, B, 1.7)
    monkeypatch.setattr(merging, "_CPU_BLOCK", block)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(delta(A, B, 1.7), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_merge_rounds_once_and_reports_what_it_did(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    W0 = torch.randn(40, 24).to(dtype)
    weight = W0.t().contiguous().t() if transposed else W0.clone()
    A, B, scale = torch.randn(3, 24), torch.randn(40, 3) * 0.05, 2.5
    stats = merging.merge_(weight, merging.Product(A, B, scale))
    dW = delta(A, B, scale)
    assert torch.equal(weight, (W0.float() + dW).to(dtype))
    change = weight.float() - W0.float()
    assert stats.w0_norm == pytest.approx(float(W0.double().norm()))
    assert stats.dw_norm == pytest.approx(float(dW.double().norm()))
    assert stats.survived == pytest.approx(float((change.double() * dW).sum() / dW.double().square().sum()), rel=1e-5)
    assert stats.changed == pytest.approx(float((change != 0).double().mean()))
    assert stats.largest_change == pytest.approx(float(change.abs().max()))


def test_an_update_below_the_precision_does_not_survive() -> None:
    W0 = torch.full((8, 8), 1.0, dtype=torch.bfloat16)
    stats = merging.merge_(W0, merging.Product(torch.full((1, 8), 1e-3), torch.full((8, 1), 0.5), 2.0))
    assert stats.changed == 0 and stats.survived == 0 and stats.dw_norm > 0


def test_delta_norm_does_not_need_delta() -> None:
    A, B = torch.randn(4, 50), torch.randn(30, 4)
    assert merging.delta_norm(A, B, -1.5) == pytest.approx(float(delta(A, B, -1.5).double().norm()), rel=1e-6)


def test_a_stack_is_summed_with_any_other_change() -> None:
    """Matrices whose rows are not those of a block: an update of each, and another value of all."""
    from deltaw.layers.ops.merging import Product, Stacked, Sum, Value, dense

    E, d, k, r = 5, 37, 2048, 3
    g = torch.Generator().manual_seed(1)
    W0, W = torch.randn(E * d, k, generator=g), torch.randn(E * d, k, generator=g)
    A, B = torch.randn(E, r, k, generator=g), torch.randn(E, d, r, generator=g)
    stacked = Stacked([Product(a, b, 1.5) for a, b in zip(A, B, strict=True)])
    alone = torch.cat([dense(product, W0[:d]) for product in stacked.products])
    assert torch.equal(dense(stacked, W0), alone)
    total = dense(Sum([(stacked, 0.5), (Value(W), -2.0)]), W0)
    torch.testing.assert_close(total, 0.5 * alone - 2.0 * (W - W0))
