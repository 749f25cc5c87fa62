"""The likeness of two adapters' directions, and the place of one's directions among its base's weights (paper, section 7)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from deltaw.layers.ops.svd import Amplified
from deltaw.runs.results import JsonObject


@dataclass(frozen=True)
class AlikeRow:
    """φ of one kind of layer, the mean over its layers: 1 for the same directions, 0 for nothing in common."""

    layers: str
    count: int
    first: float
    """φ(1, 1) of ΔW: the first directions alone."""
    first_of_A: float
    """φ(1, 1) of A."""
    first_by_chance: float
    """φ(1, 1) to be expected of random directions."""
    all: float
    """φ(r, r) of ΔW, r the smaller of the two ranks."""
    all_of_A: float
    all_by_chance: float


@dataclass(frozen=True)
class AlikeMap:
    """φ(i, j) of one layer's ΔW."""

    layer: str
    values: list[list[float]]
    """[i, j], both from 1."""


@dataclass(frozen=True)
class Alike:
    """The directions of one adapter beside those of another."""

    rank: int
    other_rank: int
    rows: list[AlikeRow]
    maps: list[AlikeMap]
    other: str = ""
    """The other adapter, for people to read."""
    targets: str | None = None
    """The choice of targets that both are of, in a sweep."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Alike:
        rows, maps = (
            [AlikeRow(**row) for row in values["rows"]],
            [AlikeMap(**values_of_map) for values_of_map in values["maps"]],
        )
        return cls(values["rank"], values["other_rank"], rows, maps, values["with"], values.get("targets"))

    def to_json(self) -> dict[str, object]:
        values = dataclasses.asdict(self)
        values["with"] = values.pop("other")
        if self.targets is None:
            del values["targets"]
        return values


@dataclass(frozen=True)
class Amplification:
    """Table 7 of the paper for one layer."""

    layer: str
    amount: Amplified

    @classmethod
    def from_json(cls, values: JsonObject) -> Amplification:
        return cls(values["layer"], Amplified(**{f.name: values[f.name] for f in dataclasses.fields(Amplified)}))

    def to_json(self) -> dict[str, object]:
        return {"layer": self.layer, "factor": self.amount.factor, **dataclasses.asdict(self.amount)}
