"""Directions of updates: how alike they are, and how they lie to W; maps of that."""

from __future__ import annotations

import pytest
import torch

from deltaw.layers.ops.svd import amplified, by_chance, right_directions, similarity, triples
from deltaw.runs.reports.heatmap import HeatMap, render_map


def orthonormal(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q.t()


def test_subspaces_are_as_alike_as_they_are() -> None:
    one = orthonormal(6, 40, 0)
    assert torch.allclose(similarity(one, one).diagonal(), torch.ones(6).double())
    # The same subspace by other directions, and one at right angles to it
    turned = orthonormal(3, 3, 1) @ one[:3]
    assert similarity(one[:3], turned)[-1, -1] == pytest.approx(1)
    assert similarity(one[:3], one[3:]).abs().max() < 1e-12
    phi = similarity(one, orthonormal(4, 40, 2))
    assert phi.shape == (6, 4) and bool((phi >= 0).all()) and bool((phi <= 1 + 1e-12).all())
    # By its definition: the sum of the squared cosines over the smaller number
    expected = (one[:2] @ orthonormal(4, 40, 2)[:3].t()).square().sum() / 2
    assert phi[1, 2] == pytest.approx(float(expected))


def test_random_subspaces_are_as_alike_as_chance_has_it() -> None:
    found = torch.stack(
        [similarity(orthonormal(5, 30, 2 * i), orthonormal(3, 30, 2 * i + 1)) for i in range(200)]
    ).mean(0)
    assert torch.allclose(found, by_chance(5, 3, 30), atol=0.02)


def test_right_directions_span_the_rows() -> None:
    A = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    assert similarity(right_directions(A), torch.linalg.qr(A.double().t()).Q.t())[-1, -1] == pytest.approx(1)


def test_amplification_is_that_of_dense_matrices() -> None:
    """ΔW lies in directions that W has in part, so that all is known."""
    chance = torch.Generator().manual_seed(4)
    W = torch.randn(30, 20, generator=chance)
    A, B = torch.randn(5, 20, generator=chance), torch.randn(30, 5, generator=chance)
    found = amplified(W, triples(A, B), 3)
    U, S, Vh = torch.linalg.svd((B @ A).double())
    assert found.by_update == pytest.approx(float((U[:, :3].t() @ W.double() @ Vh[:3].t()).norm()), rel=1e-5)
    assert found.update == pytest.approx(float(S[:3].norm()), rel=1e-5)
    assert found.by_weight == pytest.approx(float(torch.linalg.svdvals(W)[:3].norm()), rel=1e-4)
    assert found.weight == pytest.approx(float(W.norm()), rel=1e-5) and found.by_chance < found.by_weight
    assert found.factor == pytest.approx(found.update / found.by_update)


def test_a_maps_squares_are_its_values() -> None:
    page = render_map(HeatMap("φ <", "j", "i", [[1.0, 1.0, 0.0], [0.5, 0.25, float("nan")]]))
    assert "φ &lt;" in page and "0.25" in page and 'fill-opacity="1"' in page
    assert page.count("<rect") == 5 + 5  # neighbours of one shade are one, and the scale
