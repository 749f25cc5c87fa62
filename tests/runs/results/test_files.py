"""Files that a version of before wrote are read, and would be written as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltaw.runs.reports.compare import comparison_report
from deltaw.runs.reports.page import render
from deltaw.runs.reports.rank import rank_report
from deltaw.runs.reports.sweep import sweep_report
from deltaw.runs.results import compare, sweep
from deltaw.runs.results.compare import CandidateScore, ComparisonResults
from deltaw.runs.results.rank import RankResults
from deltaw.runs.results.study import Failed
from deltaw.runs.results.sweep import RunScore, SweepResults
from tests.runs.conftest import BEFORE


def read(name: str) -> dict[str, Any]:
    return json.loads((BEFORE / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "kind", "report"),
    [
        ("sweep.json", SweepResults, sweep_report),
        ("sweep/results.json", SweepResults, sweep_report),
        ("compare/results.json", ComparisonResults, comparison_report),
        ("rank.json", RankResults, rank_report),
        ("rank_confirmed.json", RankResults, rank_report),
    ],
)
def test_results_of_before_are_read_shown_and_written_as_they_were(name: str, kind: Any, report: Any) -> None:
    plain = read(name)
    results = kind.from_json(plain)
    assert json.loads(json.dumps(results.to_json())) == plain
    assert "</html>" in render(report(results))


@pytest.mark.parametrize("path", sorted(BEFORE.glob("*/runs/*/score.json")), ids=lambda path: path.parent.name)
def test_a_score_of_before_is_read_and_written_as_it_was(path: Path) -> None:
    plain = json.loads(path.read_text(encoding="utf-8"))
    module: Any = compare if "compare" in path.parts else sweep
    outcome = module.outcome_from(plain)
    assert isinstance(outcome, Failed if "error" in plain else (RunScore, CandidateScore))
    assert {"task": plain["task"], **json.loads(json.dumps(outcome.to_json()))} == plain


def test_a_run_that_ended_among_the_worse_half_is_read_and_written_as_it_was() -> None:
    plain = {"behind": 4, "valid_loss": 2.5}
    outcome = sweep.outcome_from(plain)
    assert outcome == sweep.Behind(4, 2.5) and outcome.to_json() == plain


def test_a_score_that_does_not_keep_what_each_item_adds_is_no_result() -> None:
    score = {"value": 1.0, "low": 0.5, "high": 1.5}
    assert compare.outcome_from({"scores": {"loss": score}}) is None
    assert sweep.outcome_from({"scores": {"loss": score}, "losses": {"sums": [1.0], "counts": [1.0]}}) is None
    losses = {"sums": [1.0], "counts": [1.0], "items": [0]}
    assert sweep.outcome_from({"scores": {"loss": score, "accuracy": score}, "losses": losses}) is None


def test_results_older_than_their_newest_parts_are_read() -> None:
    plain = read("compare/results.json")
    for name in ("sets", "warnings", "compared"):
        del plain[name]
    results = ComparisonResults.from_json(plain)
    assert (results.sets, results.warnings, results.compared) == ({}, [], []) and "Test records" in str(
        comparison_report(results).facts
    )
