"""Rules of thumb: what they say of a run's own settings."""

from __future__ import annotations

from typing import Any

import pytest

from deltaw.runs.reports.rank import hints

RESULTS: dict[str, Any] = {
    "rank": 4, "ranks": [{"rank": 4, "parameters": 1000}, {"rank": 64, "parameters": 16_000}], "loop": {}, "settings": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "keep the same α and"),
        ({"alpha": None}, "keep α = 64 and"),
        ({"alpha": 8.0, "scaling": "alpha/r"}, "keep α = 8 and"),
        ({"alpha": 8.0, "scaling": "alpha/sqrt(r)"}, "α/√r, of which this is not said"),
    ],
)
def test_what_to_keep_at_another_rank(settings: dict[str, Any], said: str) -> None:
    assert said in hints(RESULTS | {"settings": settings})[-1][1]


@pytest.mark.parametrize(("supervised", "verdict"), [(500, "there is room"), (5000, "it may bind")])
def test_bits_that_the_parameters_hold(supervised: int, verdict: str) -> None:
    """r = 4 has 1,000 parameters, 2,000 bits; 500 predictions at ln 4 nats are 1,000 bits."""
    loop = {"supervised": supervised, "first_loss": 1.386294}
    _, here, _ = hints(RESULTS | {"loop": loop})[0]
    assert verdict in here and "2k bits" in here and f"{supervised * 2 // 1000}k to learn" in here
