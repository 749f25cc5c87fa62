"""The file rank.json: a run's adapter, cut to smaller ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from deltaw.runs.evaluation.bootstrap import Score, Tested
from deltaw.runs.memory.machine import Environment
from deltaw.runs.results import JsonObject
from deltaw.runs.results.directions import Alike, Amplification
from deltaw.runs.results.scores import SeedScores, score_from, scores_to_json, seed_scores, tested_from


@dataclass(frozen=True)
class Cost:
    """The cost of training at a rank."""

    memory: int
    """Bytes at the peak."""
    flops_per_token: float | None
    length: int
    """Tokens of the records that this is told for."""


@dataclass(frozen=True)
class RankRow:
    """The adapter, cut to one rank."""

    tested: Tested
    """Its loss, beside the whole adapter's."""
    energy: float
    """Share of ‖ΔW‖² that is kept."""
    parameters: int
    bytes: int
    bytes_with_optimizer: int
    """The same with AdamW's state."""
    scores: dict[str, SeedScores]
    """Besides the loss, by metric."""
    parts: list[float]
    """[items]: what each item adds to the loss, as jackknife pseudo-values."""
    cost: Cost | None
    """None where the run does not say how it was trained."""

    @property
    def rank(self) -> int:
        """Directions that are kept, of each layer that has as many."""
        return self.tested.rank

    @classmethod
    def from_json(cls, values: JsonObject) -> RankRow:
        names = ("energy", "parameters", "bytes", "bytes_with_optimizer", "parts")
        cost = Cost(values["memory"], values["flops_per_token"], values["length"]) if "memory" in values else None
        plain = {name: values[name] for name in names}
        return cls(tested=tested_from(values), scores=seed_scores(values["scores"]), cost=cost, **plain)

    def to_json(self) -> dict[str, object]:
        return {
            **dataclasses.asdict(self.tested),
            "energy": self.energy,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "bytes_with_optimizer": self.bytes_with_optimizer,
            "scores": scores_to_json(self.scores),
            "parts": self.parts,
            **(dataclasses.asdict(self.cost) if self.cost is not None else {}),
        }


@dataclass(frozen=True)
class Allocated:
    """The parameters of one rank everywhere, spent where they keep the most of ΔW."""

    rank: int
    """The rank that has as many."""
    parameters: int
    loss: Score
    difference: Score
    """Its loss less that of one rank everywhere."""
    better: bool
    """The whole interval of the difference is below 0."""
    ranks: dict[str, int]
    """Layer → its rank."""
    bytes: int

    @classmethod
    def from_json(cls, values: JsonObject) -> Allocated:
        return cls(**values | {name: score_from(values[name]) for name in ("loss", "difference")})

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of one layer's ΔW."""

    layer: str
    shape: list[int]
    """d, k"""
    norm: float
    """‖ΔW‖, Frobenius."""
    effective_rank: float
    rank_90: int
    rank_99: int
    """The ranks that hold 90% and 99% of ‖ΔW‖²."""
    values: list[float]
    """Falling, as many as the rank."""


@dataclass(frozen=True)
class ScoresOfBase:
    """The base without the adapter, on the same records."""

    loss: float
    scores: dict[str, SeedScores]
    """Besides the loss, by metric."""
    less_adapter: Score
    """Its loss less the whole adapter's, item by item."""

    @classmethod
    def from_json(cls, values: JsonObject) -> ScoresOfBase:
        return cls(values["loss"], seed_scores(values["scores"]), score_from(values["less_adapter"]))

    def to_json(self) -> dict[str, object]:
        last = {"scores": scores_to_json(self.scores), "less_adapter": self.less_adapter.plain()}
        return {"loss": self.loss, **last}


@dataclass(frozen=True)
class RecordsUsed:
    """The records that ranks are scored on."""

    count: int
    items: int
    """The number of items: records with the same prompt are one."""
    what: str
    """Both counts in words."""
    overlap: str | None
    """A warning where the run was trained on the same prompts."""
    source: str
    stopped_by: bool
    """The run was ended by these very records, so that their losses are a little too good."""


@dataclass(frozen=True)
class Confirmed:
    """The recommended rank and the adapter's, both trained again and scored on records that chose nothing."""

    held: bool
    """The recommendation holds: the smaller rank is enough there too."""
    rank: int
    full: int
    """The adapter's rank."""
    loss: Score
    full_loss: Score
    difference: Score
    """`loss` less `full_loss`."""
    margin: float
    seeds: int
    report: str

    @classmethod
    def from_json(cls, values: JsonObject) -> Confirmed:
        return cls(**values | {name: score_from(values[name]) for name in ("loss", "full_loss", "difference")})

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class NotConfirmed:
    """Training again came to no result."""

    failed: str
    """Why."""

    def to_json(self) -> dict[str, object]:
        return {"failed": self.failed}


def _confirmation_from(values: JsonObject | None) -> Confirmed | NotConfirmed | None:
    if values is None:
        return None
    return NotConfirmed(values["failed"]) if "failed" in values else Confirmed.from_json(values)


@dataclass(frozen=True)
class RankResults:
    """All that rank.json holds."""

    run: str
    """The run's folder, or the adapter's."""
    settings: dict[str, object]
    """The run's, from its config.yaml; none of a foreign adapter's."""
    options: dict[str, object]
    """The settings of the search."""
    environment: Environment
    """The machine and versions, as runs/memory/machine.py describes them."""
    records: RecordsUsed
    loop: JsonObject
    """The loop's figures in the run's result.json; empty for an adapter alone."""
    warnings: list[str]
    """The run's own, from there too."""
    base: ScoresOfBase | None
    """None where the base has no head of its own."""
    rank: int
    """The recommended one."""
    margin: float
    """The most that a loss may be worse, in the loss's own unit."""
    by: str
    """The figure that decides: the loss, or for classes their error rate, which then stands in the loss's place."""
    ranks: list[RankRow]
    """Rising, the adapter's own last."""
    allocated: list[Allocated]
    layers: list[LayerSpectrum]
    amplified: list[Amplification]
    alike: list[Alike]
    confirmed: Confirmed | NotConfirmed | None
    """None where it was not asked for, or the recommended rank is the adapter's."""

    @property
    def largest(self) -> RankRow:
        """The adapter at its own rank."""
        return self.ranks[-1]

    @property
    def recommended(self) -> RankRow:
        """The row of the recommended rank."""
        return next(row for row in self.ranks if row.rank == self.rank)

    @property
    def metrics(self) -> list[str]:
        """The metrics besides the loss."""
        return list(self.ranks[0].scores)

    @classmethod
    def from_json(cls, values: JsonObject) -> RankResults:
        plain = {name: values[name] for name in ("run", "settings", "options", "environment", "loop", "rank", "margin")}
        return cls(
            records=RecordsUsed(**values["records"]),
            base=None if values["base"] is None else ScoresOfBase.from_json(values["base"]),
            ranks=[RankRow.from_json(row) for row in values["ranks"]],
            allocated=[Allocated.from_json(row) for row in values["allocated"]],
            layers=[LayerSpectrum(**layer) for layer in values["layers"]],
            amplified=[Amplification.from_json(layer) for layer in values["amplified"]],
            alike=[Alike.from_json(pair) for pair in values["alike"]],
            confirmed=_confirmation_from(values["confirmed"]),
            warnings=values.get("warnings", []),
            by=values.get("by", "loss"),
            **plain,
        )

    def to_json(self) -> dict[str, object]:
        return {
            "run": self.run,
            "settings": self.settings,
            "options": self.options,
            "environment": self.environment,
            "records": dataclasses.asdict(self.records),
            "loop": self.loop,
            **({"warnings": self.warnings} if self.warnings else {}),
            "base": None if self.base is None else self.base.to_json(),
            "rank": self.rank,
            "margin": self.margin,
            **({} if self.by == "loss" else {"by": self.by}),
            "ranks": [row.to_json() for row in self.ranks],
            "allocated": [row.to_json() for row in self.allocated],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "amplified": [layer.to_json() for layer in self.amplified],
            "alike": [pair.to_json() for pair in self.alike],
            "confirmed": None if self.confirmed is None else self.confirmed.to_json(),
        }
