"""Products of frozen W0 in 8 bits: close to those of W0, for inputs with a few large columns too, and no number that is not
finite is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaw.training import frozen
from deltaw.training.frozen import Int8, hadamard, product, quantised, rotated


def off(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.double() - wanted).norm() / wanted.norm())


def of(k: int, outliers: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    """W0 of two layers, inputs of which a few columns are 50 times as large, and gradients."""
    torch.manual_seed(0)
    x = torch.randn(40, k)
    x[:, torch.randperm(k)[:outliers]] *= 50
    return [torch.randn(24, k) / k**0.5, torch.randn(40, k) / k**0.5], x, torch.randn(40, 64)


@pytest.mark.parametrize("k", [64, 576, 96, 56, 33, 7])
@pytest.mark.parametrize("outliers", [0, 5])
def test_both_products_are_near(k: int, outliers: int) -> None:
    W0s, x, g = of(k, min(outliers, k // 3))
    few, W0 = Int8(W0s, x.abs().amax(0)), torch.cat(W0s).double()
    assert off(few.forward(x), x.double() @ W0.t()) < 0.015
    assert off(few.backward(g), g.double() @ W0) < 0.015


def test_rotation_and_columns_are_what_keeps_it_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """One large column takes the levels of all others, in a row whose scale it sets."""
    W0s, x, _ = of(576, outliers=5)
    wanted = x.double() @ torch.cat(W0s).double().t()
    with_both = off(Int8(W0s, x.abs().amax(0)).forward(x), wanted)
    monkeypatch.setattr(frozen, "COLUMNS", 0)
    rotation_alone = off(Int8(W0s, x.abs().amax(0)).forward(x), wanted)
    hadamard.cache_clear()
    monkeypatch.setattr(frozen, "BLOCK", 1)
    neither = off(Int8(W0s, x.abs().amax(0)).forward(x), wanted)
    hadamard.cache_clear()
    assert 4 * with_both < rotation_alone and with_both < 0.015 and neither > 4 * with_both


@pytest.mark.parametrize(("k", "block"), [(64, 64), (576, 64), (96, 32), (56, 8), (33, 1)])
def test_the_rotation_is_its_own_inverse(k: int, block: int) -> None:
    H, x = hadamard(k, torch.device("cpu")), torch.randn(5, k)
    assert H.shape == (block, block)
    torch.testing.assert_close(rotated(rotated(x, H), H), x)
    torch.testing.assert_close(rotated(x, H).norm(dim=1), x.norm(dim=1))


def test_rows_of_zeros_are_zeros_and_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0], [float("nan"), 1.0], [float("inf"), 1.0], [1e-45, 0.0], [3e38, -3e38]])
    codes, scales = quantised(x)
    back = codes * scales
    assert back[0].tolist() == [0.0, 0.0] and back[1, 1] == -2.0
    assert torch.isnan(back[2]).all() and not torch.isfinite(back[3]).any() and torch.isfinite(back[[0, 1, 4, 5]]).all()
    W0s, x, g = of(64)
    few = Int8(W0s, x.abs().amax(0))
    x[3, 9], g[5, 2] = float("nan"), float("inf")
    assert torch.isnan(few.forward(x)[3]).all() and torch.isfinite(few.forward(x)[[0, 1, 2, 4]]).all()
    assert not torch.isfinite(few.backward(g)[5]).any() and torch.isfinite(few.backward(g)[[0, 1, 2, 3, 4]]).all()


def test_integers_and_floats_multiply_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((32, 512), (512, 24)))
    by_way = []
    for integers in (True, False):
        monkeypatch.setattr(frozen, "is_faster", lambda device, integers=integers: integers)
        by_way.append(product(a, b))
    assert torch.equal(by_way[0], (a.long() @ b.long()).float())
    torch.testing.assert_close(by_way[1], by_way[0])
