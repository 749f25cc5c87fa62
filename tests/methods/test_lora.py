"""LoRA: where A starts, and the scale of each layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaw import LoRA, attach
from deltaw.methods.updates.lowrank import INITS
from deltaw.model.summary import updates
from tests.conftest import tiny_llama


def test_a_starts_with_the_variance_that_its_method_says() -> None:
    """Gaussian: 1/k (paper, section 4.1), so that Ax is as large as x. Kaiming: uniform up to 1/sqrt(k), a third of that."""
    torch.manual_seed(0)
    for k in (60, 900):
        A = INITS["gaussian"](300, k, torch.device("cpu"), torch.float64)
        assert A.shape == (300, k) and A.dtype == torch.float64
        assert float(A.std()) == pytest.approx(k**-0.5, rel=0.02) and abs(float(A.mean())) < 0.02 * k**-0.5
        assert float(A.abs().max()) > 3 * k**-0.5
        A = INITS["kaiming"](300, k, torch.device("cpu"), torch.float32)
        assert float(A.std()) == pytest.approx((3 * k) ** -0.5, rel=0.02)
        assert 0.99 * k**-0.5 < float(A.abs().max()) <= k**-0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {2: 1.0, 8: 1.0}),
        ({"alpha": 6.0}, {2: 3.0, 8: 0.75}),
        ({"scaling": "alpha/sqrt(r)"}, {4: 2.0, 9: 3.0}),
        ({"alpha": 6.0, "scaling": "alpha/sqrt(r)"}, {4: 3.0, 9: 2.0}),
    ],
    ids=str,
)
def test_the_scale_without_alpha_is_of_each_layers_rank(settings: dict[str, Any], scales: dict[int, float]) -> None:
    method = LoRA(rank=5, **settings)
    assert {rank: method.scale(rank) for rank in scales} == pytest.approx(scales)
    model = attach(tiny_llama(), LoRA(rank=5, targets={"q": 4, "down": 9}, **settings))
    live = {update.rank: update.scale for update in updates(model).values()}
    assert live == pytest.approx({rank: method.scale(rank) for rank in (4, 9)})
