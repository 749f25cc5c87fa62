"""The files of a sweep: score.json and results.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from deltaw.runs.evaluation.bootstrap import Choice, Compared
from deltaw.runs.evaluation.evaluate import RecordLosses
from deltaw.runs.memory.machine import Environment
from deltaw.runs.results import JsonObject
from deltaw.runs.results.directions import Alike
from deltaw.runs.results.scores import (
    MetricScore,
    SeedScores,
    choice_from,
    compared_from,
    run_scores,
    scores_to_json,
    seed_scores,
)
from deltaw.runs.results.study import Curve, Failed, StudySettings, curve_from, curve_to_json


@dataclass(frozen=True)
class RunScore:
    """A run that was trained to its end, and scored."""

    parameters: int
    share: float
    """The share of the base's parameters."""
    bytes: int
    """The size of the adapter's folder."""
    bytes_with_optimizer: int
    """The same with AdamW's state."""
    seconds: float
    """The time of training, evaluations included."""
    step_seconds: float
    """The mean time of an optimizer step."""
    valid: Curve
    valid_loss: float
    """The held-out loss of the adapter that was kept."""
    valid_scores: dict[str, float]
    """Scores on the held-out records, where a learning rate is chosen by one."""
    scores: dict[str, MetricScore]
    """Scores on the test records, by metric."""
    losses: RecordLosses
    """The losses of each test record."""

    @classmethod
    def from_json(cls, values: JsonObject) -> RunScore:
        plain = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        losses = RecordLosses(**values["losses"])
        return cls(
            **plain | {"valid": curve_from(values["valid"]), "scores": run_scores(values["scores"]), "losses": losses}
        )

    def to_json(self) -> dict[str, object]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["valid"], values["scores"] = curve_to_json(self.valid), scores_to_json(self.scores)
        return values | {"losses": self.losses._asdict()}


@dataclass(frozen=True)
class Behind:
    """A run that was among the worse half, and was ended there."""

    step: int
    valid_loss: float

    @classmethod
    def from_json(cls, values: JsonObject) -> Behind:
        return cls(values["behind"], values["valid_loss"])

    def to_json(self) -> dict[str, object]:
        return {"behind": self.step, "valid_loss": self.valid_loss}


Outcome: TypeAlias = RunScore | Behind | Failed


def outcome_from(values: JsonObject) -> Outcome | None:
    """Return what score.json says a run came to; None where a version of before did not keep what each item adds."""
    if "error" in values:
        return Failed(values["error"])
    if "behind" in values:
        return Behind.from_json(values)
    others = (score for name, score in values["scores"].items() if name != "loss")
    if "items" not in values["losses"] or not all("parts" in score for score in others):
        return None
    return RunScore.from_json(values)


@dataclass(frozen=True)
class TriedRate:
    """One learning rate of a candidate."""

    lr: float
    valid_loss: float | None
    error: str | None
    behind: int | None
    """The step at which it was ended, among the worse half."""

    @classmethod
    def of(cls, lr: float, outcome: Outcome) -> TriedRate:
        """Return the learning rate with what its run came to."""
        if isinstance(outcome, Failed):
            return cls(lr, None, outcome.error, None)
        return cls(lr, outcome.valid_loss, None, outcome.step if isinstance(outcome, Behind) else None)


@dataclass(frozen=True)
class BestRun:
    """A candidate with its best learning rate. Figures are of the first seed's run; scores are over all seeds."""

    lr: float
    parameters: int
    share: float
    """The share of the base's parameters."""
    bytes: int
    bytes_with_optimizer: int
    step_seconds: float
    seconds: float
    valid: Curve
    valid_loss: float
    folder: str
    """The folder of the first seed's run."""
    scores: dict[str, SeedScores]

    @classmethod
    def from_json(cls, values: JsonObject) -> BestRun:
        plain = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        return cls(**plain | {"valid": curve_from(values["valid"]), "scores": seed_scores(values["scores"])})

    def to_json(self) -> dict[str, object]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"valid": curve_to_json(self.valid), "scores": scores_to_json(self.scores)}


@dataclass(frozen=True)
class SweepRow:
    """One candidate."""

    name: str
    targets: str
    rank: int
    alpha: float
    tried: list[TriedRate]
    best: BestRun | Failed
    """Failed where no learning rate came to a result."""

    @classmethod
    def from_json(cls, values: JsonObject) -> SweepRow:
        tried = [TriedRate(**rate) for rate in values["tried"]]
        best = Failed(values["error"]) if "error" in values else BestRun.from_json(values)
        return cls(values["name"], values["targets"], values["rank"], values["alpha"], tried, best)

    def to_json(self) -> dict[str, object]:
        first = {"name": self.name, "targets": self.targets, "rank": self.rank, "alpha": self.alpha}
        return {**first, "tried": [dataclasses.asdict(rate) for rate in self.tried], **self.best.to_json()}


@dataclass(frozen=True)
class SweepResults:
    """All that results.json of a sweep holds."""

    settings: StudySettings
    options: dict[str, object]
    """The sweep's own settings."""
    environment: Environment
    """The machine and versions, as runs/memory/machine.py describes them."""
    chosen_by: str
    """The metric by which learning rates are chosen on held-out records."""
    left_out: dict[str, str]
    """Targets whose layers cannot hold the budget → why."""
    sets: dict[str, str]
    """train, valid, test → what is in it."""
    warnings: list[str]
    rows: list[SweepRow]
    choices: dict[str, Choice]
    """Targets → the smallest rank that is enough, where several were trained."""
    compared: list[Compared]
    """The candidates beside the best one, where there are several choices of targets."""
    alike: list[Alike]

    @property
    def trained(self) -> list[tuple[SweepRow, BestRun]]:
        """The candidates that came to a result, in the order of the rows."""
        return [(row, row.best) for row in self.rows if isinstance(row.best, BestRun)]

    @property
    def failed(self) -> list[tuple[SweepRow, Failed]]:
        """The candidates without a result."""
        return [(row, row.best) for row in self.rows if isinstance(row.best, Failed)]

    @classmethod
    def from_json(cls, values: JsonObject) -> SweepResults:
        """Return the results in a file; one of before may lack `sets` and `warnings`."""
        return cls(
            settings=StudySettings.from_json(values["settings"]),
            options=values["settings"]["options"],
            environment=values["environment"],
            chosen_by=values["chosen_by"],
            left_out=values["left_out"],
            sets=values.get("sets", {}),
            warnings=values.get("warnings", []),
            rows=[SweepRow.from_json(row) for row in values["rows"]],
            choices={targets: choice_from(choice) for targets, choice in values["choices"].items()},
            compared=[compared_from(candidate) for candidate in values["compared"]],
            alike=[Alike.from_json(pair) for pair in values["alike"]],
        )

    def to_json(self) -> dict[str, object]:
        return {
            "settings": self.settings.to_json() | {"options": self.options},
            "environment": self.environment,
            "chosen_by": self.chosen_by,
            "left_out": self.left_out,
            "sets": self.sets,
            "warnings": self.warnings,
            "rows": [row.to_json() for row in self.rows],
            "choices": choices_to_json(self.choices),
            "compared": [dataclasses.asdict(candidate) for candidate in self.compared],
            "alike": [pair.to_json() for pair in self.alike],
        }


def choices_to_json(choices: Mapping[str, Choice]) -> dict[str, object]:
    """Return the chosen ranks by targets, as results.json holds them."""
    plain = {targets: dataclasses.asdict(choice) for targets, choice in choices.items()}
    return {t: {k: v for k, v in choice.items() if (k, v) != ("by", "loss")} for t, choice in plain.items()}
