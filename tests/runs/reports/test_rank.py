"""What a run's rank.json is said to mean, rules of thumb among it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from deltaw.runs.evaluation.bootstrap import Score
from deltaw.runs.reports.rank import hints, remarks
from deltaw.runs.results.rank import RankResults
from tests.runs.conftest import BEFORE

RESULTS = RankResults.from_json(json.loads((BEFORE / "rank.json").read_text(encoding="utf-8")))
"""The recommended rank, 1, has 224 parameters; the adapter's is 4."""


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "keep the same α and"),
        ({"alpha": None}, "keep α = 4 and"),
        ({"alpha": 8.0, "scaling": "alpha/r"}, "keep α = 8 and"),
        ({"alpha": 8.0, "scaling": "alpha/sqrt(r)"}, "α/√r, for which this does not hold"),
    ],
)
def test_what_to_keep_at_another_rank(settings: dict[str, Any], advice: str) -> None:
    assert advice in hints(dataclasses.replace(RESULTS, settings=settings))[-1][1]


@pytest.mark.parametrize(("supervised", "verdict"), [(100, "there is room"), (1000, "it may bind")])
def test_bits_that_the_parameters_hold(supervised: int, verdict: str) -> None:
    """224 parameters hold 448 bits; 100 predictions at ln 4 nats are 200 bits."""
    loop = {"supervised": supervised, "first_loss": 1.386294}
    _, here, _ = hints(dataclasses.replace(RESULTS, loop=loop))[0]
    assert (
        verdict in here
        and "r = 1 holds 448 bits" in here
        and f"{'200' if supervised == 100 else '2k'} to learn" in here
    )


@pytest.mark.parametrize(("low", "remarked"), [(0.1, False), (-0.1, True)])
def test_an_adapter_no_better_than_its_base_is_remarked_upon(low: float, remarked: bool) -> None:
    """Pairs decide: a base's loss within the adapter's interval says nothing."""
    base, whole = RESULTS.base, RESULTS.largest.tested.loss
    assert base is not None
    near = dataclasses.replace(base, loss=(whole.value + whole.high) / 2, less_adapter=Score(0.2, low, 0.3))
    texts = " ".join(remarks(dataclasses.replace(RESULTS, base=near)))
    assert ("not shown to be better than the base" in texts) == remarked


def test_warnings_of_the_run_stand_first() -> None:
    overlap = "2 of 4 held-out prompts were trained on."
    records = dataclasses.replace(RESULTS.records, overlap=overlap)
    texts = remarks(dataclasses.replace(RESULTS, warnings=[overlap, "Nothing was learned."], records=records))
    assert texts[0] == "The run itself warned: Nothing was learned." and texts.count(overlap) == 1
