"""What makes subtracting a merge exact: any bits come back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltaw.layers.ops import merging, residual

DTYPES = {torch.float32: np.int32, torch.bfloat16: np.int16, torch.float16: np.int16, torch.float64: np.int64}


def any_bits(dtype: torch.dtype, seed: int) -> Tensor:
    """Every kind of float: zeros of both signs, subnormals, infinities, NaN of any payload."""
    integers = DTYPES[dtype]
    bounds = np.iinfo(integers)
    drawn = np.random.default_rng(seed).integers(bounds.min, bounds.max, (4, 50), dtype=integers, endpoint=True)
    drawn[0, :4] = 0, -1, bounds.min, bounds.max
    return torch.from_numpy(drawn).view(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(residual.integers_of(a.dtype)), b.view(residual.integers_of(b.dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32))
def test_any_weight_comes_back_from_any_other(dtype: torch.dtype, seed: int) -> None:
    W0, back = any_bits(dtype, seed), any_bits(dtype, seed + 1)
    kept = residual.between(W0, back)
    residual.correct_(back, kept)
    assert same_bits(back, W0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.0, 0.001, 0.1, 1.0]))
def test_its_forms_in_memory_and_in_a_file_give_it_back(dtype: torch.dtype, seed: int, share: float) -> None:
    W0, back = any_bits(dtype, seed).repeat(1, 20), any_bits(dtype, seed + 1).repeat(1, 20)
    same = torch.rand(W0.shape, generator=torch.Generator().manual_seed(seed)) >= share
    back = torch.where(same, W0, back)
    kept = residual.between(W0, back)
    for form in (
        residual.unpacked(residual.packed(kept)),
        residual.decoded(*residual.coded(kept, W0.shape)),
    ):
        assert torch.equal(form.places, kept.places) and torch.equal(form.differences, kept.differences)
        assert form.differences.dtype == residual.integers_of(dtype)


def test_codes_of_other_escapes_are_refused() -> None:
    with pytest.raises(ValueError, match="1 escapes for 2 codes"):
        residual.decoded(torch.tensor([[-128, 3, -128]], dtype=torch.int8), torch.tensor([400], dtype=torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_differ_by_one_across_zero_too(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest float above zero
    row = torch.tensor([-tiny, -0.0, 0.0, tiny], dtype=dtype)
    found = residual.between(row[1:], row[:-1])
    assert found.places.tolist() == [0, 1, 2] and found.differences.tolist() == [1, 1, 1]


def update(seed: int = 0) -> tuple[Tensor, Tensor, float]:
    torch.manual_seed(seed)
    return torch.randn(3, 24), torch.randn(40, 3) * 0.05, 2.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-6], ids=["ordinary", "swamped"])
def test_a_merge_taken_back_with_its_residual_is_w0(
    dtype: torch.dtype, transposed: bool, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in other blocks than it was merged in, as on a machine with more cores."""
    A, B, scale = update()
    W0 = (torch.randn(40, 24) * size).to(dtype)
    W0[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    W = W0.t().contiguous().t() if transposed else W0.clone()
    monkeypatch.setattr(merging, "_CPU_BLOCK", 50)
    stats, kept = merging.merge_reversibly_(W, merging.Product(A, B, scale))
    plain = W0.clone()
    assert stats == merging.merge_(plain, merging.Product(A, B, scale)) and torch.equal(W, plain)
    approximate = W.clone()
    monkeypatch.setattr(merging, "_CPU_BLOCK", 1000)
    merging.restore_(W, merging.Product(A, B, scale), kept)
    assert same_bits(W.contiguous(), W0)
    merging.restore_(approximate, merging.Product(A, B, scale))
    assert (approximate.double() - W0.double()).abs().max() <= merging.restored_within(plain, approximate)


def test_an_ordinary_update_leaves_nearly_nothing_to_keep() -> None:
    torch.manual_seed(0)
    W0 = torch.randn(256, 256)
    A, B = torch.randn(8, 256), torch.randn(256, 8) * 0.01
    _, kept = merging.merge_reversibly_(W0.clone(), merging.Product(A, B, 1.3))
    packed = residual.packed(kept)
    assert len(kept.places) < 0.2 * W0.numel() and packed.escapes.numel() < 0.001 * W0.numel()
    assert packed.bytes < 0.1 * W0.numel() * W0.element_size()
