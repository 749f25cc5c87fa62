"""Truncated decompositions: the nearest ΔW of a rank, and its error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.layers.ops.svd import of_factors, of_matrix


@given(
    d=st.integers(1, 30), k=st.integers(1, 30), R=st.integers(1, 40), rank=st.integers(1, 12), seed=st.integers(0, 2**16)
)  # fmt: skip
def test_factors_and_matrix_agree_with_the_error_they_say(d: int, k: int, R: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(R, k, generator=generator), torch.randn(d, R, generator=generator)
    dW = B.double() @ A.double()
    for found in (of_factors(A, B, rank=rank), of_matrix(dW, rank=rank)):
        assert found.A.shape[0] <= rank and found.A.shape[1] == k and found.B.shape == (d, found.A.shape[0])
        missing = torch.linalg.matrix_norm(dW - found.B.double() @ found.A.double()) / torch.linalg.matrix_norm(dW)
        assert abs(float(missing) - found.error) < 1e-5
    best = torch.linalg.svdvals(dW)
    assert of_factors(A, B, rank=rank).error == pytest.approx(
        float(best[rank:].square().sum().sqrt() / best.square().sum().sqrt()), abs=1e-6
    )


def test_energy_chooses_the_smallest_rank_that_keeps_it() -> None:
    U, _ = torch.linalg.qr(torch.randn(20, 4))
    V, _ = torch.linalg.qr(torch.randn(15, 4))
    S = torch.tensor([4.0, 2.0, 1.0, 0.5])
    dW = U * S @ V.t()
    shares = (S.square().cumsum(0) / S.square().sum()).tolist()
    for r in (1, 2, 3):
        assert of_matrix(dW, energy=shares[r - 1] - 1e-4).A.shape[0] == r
        assert of_factors(V.t(), U * S, energy=shares[r - 1] + 1e-4).A.shape[0] == r + 1
    assert of_factors(V.t(), U * S, energy=1.0).error < 1e-6


def test_a_zero_update_has_no_error() -> None:
    found = of_factors(torch.randn(3, 8), torch.zeros(6, 3), rank=2)
    assert found.error == 0.0 and not found.B.any()
