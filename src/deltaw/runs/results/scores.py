"""Scores on test records: a run's own, a candidate's over its seeds, and those of candidates beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deltaw.runs.evaluation.bootstrap import Choice, Compared, ItemScore, Measured, Score, Tested, shortened
from deltaw.runs.evaluation.metrics import limits
from deltaw.runs.results import JsonObject


class HasInterval(Protocol):
    """A figure with its 95% interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@dataclass(frozen=True)
class MetricScore:
    """A metric of one run on its test records."""

    value: float
    low: float
    high: float
    """`low` and `high` end the 95% interval over items."""
    parts: list[float] | None = None
    """[items]: jackknife pseudo-values, what each item adds to the score. None where the run's losses are kept instead."""

    @classmethod
    def of(cls, score: ItemScore, *, parts: bool = True) -> MetricScore:
        """Return the score as files hold it, its parts in six digits."""
        return cls(score.value, score.low, score.high, shortened(score.parts) if parts else None)

    @classmethod
    def from_json(cls, values: JsonObject) -> MetricScore:
        return cls(values["value"], values["low"], values["high"], values.get("parts"))

    def to_json(self) -> dict[str, object]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class SeedScores:
    """A metric of one candidate: the mean over its runs, which have a seed each."""

    seeds: list[float]
    """[runs]: the metric of each run."""
    value: float
    low: float
    high: float
    """`low` and `high` end the 95% interval; of several runs the seeds' variance is in it."""

    @property
    def mean(self) -> float:
        """The mean over runs."""
        return sum(self.seeds) / len(self.seeds)

    @property
    def deviation(self) -> float:
        """The standard deviation over runs; there must be two at least."""
        squares = sum((score - self.mean) ** 2 for score in self.seeds)
        return float((squares / (len(self.seeds) - 1)) ** 0.5)

    @classmethod
    def from_json(cls, values: JsonObject) -> SeedScores:
        return cls(values["seeds"], values["value"], values["low"], values["high"])

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def measured_by(scores: Sequence[MetricScore], seeds: Sequence[int], metric: str) -> Measured:
    """Return a metric of one candidate, from its runs' scores with their parts."""
    values, parts = (np.array([getattr(score, part) for score in scores], float) for part in ("value", "parts"))
    return Measured(values, parts, tuple(seeds), limits(metric))


def over_seeds(first: MetricScore, measured: Measured) -> SeedScores:
    """Return the metric of a candidate.

    first: the score of its first run, whose interval is the candidate's where there is no other run.
    """
    if len(measured.seeds) == 1:
        return SeedScores([first.value], first.value, first.low, first.high)
    mean = measured.interval()
    return SeedScores(measured.values.tolist(), mean.value, mean.low, mean.high)


def scores_to_json(scores: Mapping[str, MetricScore] | Mapping[str, SeedScores]) -> dict[str, object]:
    """Return the scores by metric, as files hold them."""
    return {metric: score.to_json() for metric, score in scores.items()}


def run_scores(values: JsonObject) -> dict[str, MetricScore]:
    """Return a run's scores by metric."""
    return {metric: MetricScore.from_json(score) for metric, score in values.items()}


def seed_scores(values: JsonObject) -> dict[str, SeedScores]:
    """Return a candidate's scores by metric."""
    return {metric: SeedScores.from_json(score) for metric, score in values.items()}


# --- candidates beside each other ---------------------------------------------------------------------------------


def score_from(values: JsonObject) -> Score:
    """Return a figure with its interval."""
    return Score(values["value"], values["low"], values["high"])


def tested_from(values: JsonObject) -> Tested:
    """Return one rank beside the largest."""
    return Tested(values["rank"], score_from(values["loss"]), score_from(values["difference"]), values["enough"])


def choice_from(values: JsonObject) -> Choice:
    """Return the choice of a rank."""
    return Choice(
        values["rank"], values["margin"], [tested_from(tested) for tested in values["tested"]], values.get("by", "loss")
    )


def compared_from(values: JsonObject) -> Compared:
    """Return one candidate beside the best."""
    return Compared(values["name"], score_from(values["score"]), score_from(values["difference"]), values["worse"])
