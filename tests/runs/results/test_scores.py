"""Scores of runs and of candidates."""

from __future__ import annotations

import pytest

from deltaw.runs.evaluation.metrics import accuracy
from deltaw.runs.results.scores import MetricScore, SeedScores, measured_by, over_seeds


def test_several_runs_have_one_interval_within_the_metrics_range() -> None:
    runs = [MetricScore.of(accuracy([0] * 19 + [i], [0] * 20, 2)) for i in (0, 0, 1)]
    scores, matthews, bleu = (
        over_seeds(runs[0], measured_by(runs, (0, 1, 2), m)) for m in ("accuracy", "matthews", "bleu")
    )
    assert scores.seeds == [1.0, 1.0, 0.95] and scores.value == pytest.approx(0.98333, abs=1e-5)
    assert scores.high == matthews.high == 1.0 < bleu.high and scores.low < 0.95


def test_the_interval_of_a_single_run_is_that_of_its_score() -> None:
    run = MetricScore.of(accuracy([0] * 19 + [1], [0] * 20, 2))
    assert over_seeds(run, measured_by([run], (2,), "accuracy")) == SeedScores([0.95], run.value, run.low, run.high)


def test_a_score_without_its_parts_is_written_without_them() -> None:
    score = MetricScore(1.0, 0.5, 1.5)
    assert score.to_json() == {"value": 1.0, "low": 0.5, "high": 1.5}
    assert MetricScore.from_json({"value": 1.0, "low": 0.5, "high": 1.5}) == score
