"""Parts that the files of a sweep and of a comparison have in common."""

from __future__ import annotations

from dataclasses import dataclass

from deltaw.runs.results import JsonObject


@dataclass(frozen=True)
class StudySettings:
    """The settings that decide about results. Which candidates there are is no part of them: more may be added."""

    model: str
    data: str
    test: str | None
    """The test records, where they were named."""
    test_most: int
    valid: str | None
    """The held-out records, where they were named."""
    run: dict[str, object]
    """Settings of training that all candidates share."""
    halving: bool | None = None
    """True if the worse half of a sweep's candidates ends early. None for a comparison, which has no such setting."""

    @classmethod
    def from_json(cls, values: JsonObject) -> StudySettings:
        known = {name: values[name] for name in ("model", "data", "test", "test_most", "valid", "run")}
        return cls(**known, halving=values.get("halving"))

    def to_json(self) -> dict[str, object]:
        halving = {} if self.halving is None else {"halving": self.halving}
        first = {"model": self.model, "data": self.data, "test": self.test, "test_most": self.test_most}
        return {**first, **halving, "valid": self.valid, "run": self.run}


@dataclass(frozen=True)
class Failed:
    """A candidate without a result."""

    error: str
    """Why: a loss that is not finite, for example."""

    def to_json(self) -> dict[str, object]:
        return {"error": self.error}


Curve = list[tuple[int, float]]
"""Step and held-out loss of each evaluation."""


def curve_from(values: list[list[float]]) -> Curve:
    """Return the held-out losses by step."""
    return [(int(step), loss) for step, loss in values]


def curve_to_json(curve: Curve) -> list[list[float]]:
    """Return the held-out losses by step, as files hold them."""
    return [[step, loss] for step, loss in curve]
