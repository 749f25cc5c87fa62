"""The files of a comparison: candidate.json and score.json, timing.json and latency.json, results.json."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeAlias

from deltaw.config import DType
from deltaw.runs.evaluation.bootstrap import Compared
from deltaw.runs.evaluation.metrics import MORE_IS_BETTER
from deltaw.runs.memory.machine import Environment
from deltaw.runs.results import JsonObject
from deltaw.runs.results.scores import MetricScore, SeedScores, compared_from, run_scores, scores_to_json, seed_scores
from deltaw.runs.results.study import Curve, Failed, StudySettings, curve_from, curve_to_json


@dataclass(frozen=True)
class CandidateTask:
    """The content of candidate.json: a task for the process that trains one candidate."""

    name: str
    """The method as it was written."""
    method: str
    """Its name in the registry."""
    settings: dict[str, object]
    """The method's."""
    model: str
    train: str
    test: str
    """`train` and `test` are files of records."""
    metrics: list[str]
    run: dict[str, object]
    """The settings of training."""
    valid_metrics: list[str]
    """Scores to take on the held-out records."""

    @classmethod
    def from_json(cls, values: JsonObject) -> CandidateTask:
        return cls(**values)

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RunFigures:
    """The cost of training one candidate, and its held-out loss."""

    notes: list[str]
    parameters: int
    share: float
    """The share of the base's parameters."""
    bytes: int
    """The size of the adapter's folder."""
    bytes_with_optimizer: int
    """The same with AdamW's state."""
    base_bytes: int
    memory: int | None
    """Bytes that training held over the loaded model and its adapter; None where it cannot be told."""
    seconds: float
    """The time of training, evaluations included."""
    steps: int
    tokens_per_second: float
    """The median over the log's lines."""
    step_seconds: float
    """The mean time of an optimizer step."""
    valid_loss: float | None
    """The held-out loss of the adapter that was kept; None where nothing is held out."""

    @classmethod
    def from_json(cls, values: JsonObject) -> RunFigures:
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class CandidateScore:
    """A candidate that was trained to its end, and scored."""

    figures: RunFigures
    valid: Curve
    valid_scores: dict[str, float]
    """Scores on the held-out records, by metric."""
    scores: dict[str, MetricScore]
    """Scores on the test records, by metric."""

    @property
    def valid_loss(self) -> float | None:
        """The held-out loss of the adapter that was kept."""
        return self.figures.valid_loss

    @property
    def seconds(self) -> float:
        """The time of training, evaluations included."""
        return self.figures.seconds

    @classmethod
    def from_json(cls, values: JsonObject) -> CandidateScore:
        valid, scores = curve_from(values["valid"]), run_scores(values["scores"])
        return cls(RunFigures.from_json(values), valid, values["valid_scores"], scores)

    def to_json(self) -> dict[str, object]:
        last = {"valid": curve_to_json(self.valid), "valid_scores": self.valid_scores}
        return {**self.figures.to_json(), **last, "scores": scores_to_json(self.scores)}


Outcome: TypeAlias = CandidateScore | Failed


def outcome_from(values: JsonObject) -> Outcome | None:
    """Return what score.json says a candidate came to; None where a version of before did not keep what each item adds."""
    if "error" in values:
        return Failed(values["error"])
    if not all("parts" in score for score in values["scores"].values()):
        return None
    return CandidateScore.from_json(values)


@dataclass(frozen=True)
class TimingTask:
    """The content of timing.json: a task for the process that times inference."""

    model: str
    dtype: DType
    device: str
    adapters: dict[str, str]
    """Method → its adapter's folder."""
    passes: list[list[int]]
    """Rows and tokens of each forward pass."""
    decoding: list[int]
    """Rows that are decoded."""
    seconds: float
    """Longest time for each setting, all methods together."""
    trust_remote_code: bool = False
    """The model's own code may run."""

    @classmethod
    def from_json(cls, values: JsonObject) -> TimingTask:
        return cls(**values)

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LatencyRow:
    """Inference of one kind and size with each method."""

    what: str
    batch: int
    length: int
    base: float
    """Seconds of the base alone."""
    ratios: dict[str, float]
    """Method → its time over the base's."""
    rounds: int | None
    """Repetitions of each timing; None in a file of an older version, which does not say."""

    @classmethod
    def from_json(cls, values: JsonObject) -> LatencyRow:
        names = ("what", "batch", "length", "base", "ratios")
        return cls(**{name: values[name] for name in names}, rounds=values.get("rounds"))

    def to_json(self) -> dict[str, object]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class TriedRate:
    """One learning rate of a method."""

    lr: float
    valid_loss: float | None
    valid_score: float | None
    """The score on the held-out records, where a score chooses."""
    error: str | None

    @classmethod
    def of(cls, lr: float, outcome: Outcome, chosen_by: str) -> TriedRate:
        """Return the learning rate with what its run came to."""
        if isinstance(outcome, Failed):
            return cls(lr, None, None, outcome.error)
        return cls(lr, outcome.valid_loss, outcome.valid_scores.get(chosen_by), None)


@dataclass(frozen=True)
class BestRun:
    """A method with its best learning rate. Figures are of the first seed's run; scores are over all seeds."""

    lr: float
    figures: RunFigures
    scores: dict[str, SeedScores]
    valid: Curve

    @classmethod
    def from_json(cls, values: JsonObject) -> BestRun:
        scores = seed_scores(values["scores"])
        return cls(values["lr"], RunFigures.from_json(values), scores, curve_from(values["valid"]))

    def to_json(self) -> dict[str, object]:
        last = {"scores": scores_to_json(self.scores), "valid": curve_to_json(self.valid)}
        return {"lr": self.lr, **self.figures.to_json(), **last}


@dataclass(frozen=True)
class MethodRow:
    """One method."""

    name: str
    """The method as the user wrote it."""
    method: str
    """Its name in the registry."""
    settings: dict[str, object]
    """Settings that are not its defaults."""
    tried: list[TriedRate]
    best: BestRun | Failed
    """Failed where no learning rate came to a result."""

    @classmethod
    def from_json(cls, values: JsonObject) -> MethodRow:
        tried = [TriedRate(**rate) for rate in values["tried"]]
        best = Failed(values["error"]) if "error" in values else BestRun.from_json(values)
        return cls(values["name"], values["method"], values["settings"], tried, best)

    def to_json(self) -> dict[str, object]:
        first = {"name": self.name, "method": self.method, "settings": self.settings}
        return {**first, "tried": [dataclasses.asdict(rate) for rate in self.tried], **self.best.to_json()}


Trained: TypeAlias = tuple[MethodRow, BestRun]


@dataclass(frozen=True)
class ComparisonResults:
    """All that results.json of a comparison holds."""

    settings: StudySettings
    environment: Environment
    """The machine and versions, as runs/memory/machine.py describes them."""
    chosen_by: str
    """The metric by which learning rates are chosen on held-out records."""
    sets: dict[str, str]
    """train, valid, test → what is in it."""
    warnings: list[str]
    rows: list[MethodRow]
    compared: list[Compared]
    """The methods beside the best one."""
    latency: list[LatencyRow]
    beside_full: list[Compared] = dataclasses.field(default_factory=list)
    """The methods beside full fine-tuning, which comes first; none where that was not compared."""

    @property
    def metrics(self) -> list[str]:
        """The metrics on the test records; none where every method failed."""
        return next((list(row.best.scores) for row in self.rows if isinstance(row.best, BestRun)), [])

    @property
    def metric(self) -> str:
        """The metric that ranks the methods: the last one."""
        return next(reversed(self.metrics), "")

    @property
    def ranked(self) -> list[MethodRow]:
        """The methods, the best first, of equals the smaller; those that failed last."""
        sign = -1.0 if self.metric in MORE_IS_BETTER else 1.0

        def place(row: MethodRow) -> tuple[float, int]:
            if isinstance(row.best, Failed):
                return math.inf, 0
            value = sign * row.best.scores[self.metric].mean
            return (math.inf if math.isnan(value) else value), row.best.figures.parameters

        return sorted(self.rows, key=place)

    @property
    def trained(self) -> list[Trained]:
        """The methods that came to a result, the best first."""
        return [(row, row.best) for row in self.ranked if isinstance(row.best, BestRun)]

    @classmethod
    def from_json(cls, values: JsonObject) -> ComparisonResults:
        """Return the results in a file; one of before may lack `sets`, `warnings` and `compared`."""
        return cls(
            settings=StudySettings.from_json(values["settings"]),
            environment=values["environment"],
            chosen_by=values["chosen_by"],
            sets=values.get("sets", {}),
            warnings=values.get("warnings", []),
            rows=[MethodRow.from_json(row) for row in values["rows"]],
            compared=[compared_from(method) for method in values.get("compared", [])],
            latency=[LatencyRow.from_json(row) for row in values["latency"]],
            beside_full=[compared_from(method) for method in values.get("beside_full", [])],
        )

    def to_json(self) -> dict[str, object]:
        beside_full = {"beside_full": [dataclasses.asdict(m) for m in self.beside_full]} if self.beside_full else {}
        return {
            "settings": self.settings.to_json(),
            "environment": self.environment,
            "chosen_by": self.chosen_by,
            "sets": self.sets,
            "warnings": self.warnings,
            "rows": [row.to_json() for row in self.rows],
            "compared": [dataclasses.asdict(method) for method in self.compared],
            "latency": [row.to_json() for row in self.latency],
            **beside_full,
        }
