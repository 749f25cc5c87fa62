"""Which rank a finished run's data needed, from its one adapter: cut to each smaller rank, scored on held-out records, compared
in pairs; and which directions there are. Prints nothing: it reports events.

Cutting and scoring are of the very file that `compress` would write.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deltaw.config import GenerateConfig, PlanConfig, RankConfig, SweepConfig, TrainConfig, to_mapping
from deltaw.data.batches import padded
from deltaw.data.prompts import described, items_in
from deltaw.data.sources import is_path
from deltaw.errors import ConfigError, DataError, DeltaWError
from deltaw.files import store
from deltaw.files.compress import Spectrum, allocated, spectra_of, triples_of, truncated
from deltaw.files.formats import peft
from deltaw.files.formats.atomic import write_text
from deltaw.files.formats.peft import LoRAFile
from deltaw.files.renames import renamed
from deltaw.layers import tree
from deltaw.model import attach
from deltaw.model.switch import using
from deltaw.runs.candidates import numbers
from deltaw.runs.directions import alike, amplifications
from deltaw.runs.evaluation.bootstrap import Choice, Measured, chosen, of_losses, shortened
from deltaw.runs.evaluation.evaluate import evaluate
from deltaw.runs.folder import Finished, finished, parameters_of
from deltaw.runs.memory import machine
from deltaw.runs.memory.plan import plan
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.reports.rank import rank_report
from deltaw.runs.scoring import metrics_for
from deltaw.runs.sweep import Progress as SweepProgress
from deltaw.runs.sweep import sweep
from deltaw.training.opening import equip
from deltaw.training.optim import ADAM_STATE
from deltaw.training.prepare import HeldOut, held_out
from deltaw.training.tasks import task_of

log = logging.getLogger("deltaw")

RESULTS, REPORT, CONFIRMED = "rank.json", "rank.html", "confirmed"
_DIGITS = 6


@dataclass(frozen=True)
class Progress:
    """Something that happened, for whoever shows it."""

    kind: Literal["scored", "confirming"]
    values: dict[str, Any]


@dataclass(frozen=True)
class RankChoice:
    """What `choose_rank` returns."""

    rank: int
    """The smallest that is enough."""
    choice: Choice
    """What says so."""
    report: Path
    results: dict[str, Any]
    """What rank.json holds."""


def choose_rank(
    run: str | Path,
    config: RankConfig = RankConfig(),  # noqa: B008  (frozen)
    *,
    on_event: Callable[[Progress], None] = lambda event: None,
) -> RankChoice:
    """Cut the adapter of a finished run to smaller ranks, score each on records that it was not trained on, and recommend the
    smallest whose loss is, with 95% confidence, not worse than the whole adapter's by more than `config.margin` of it. Writes
    rank.json and rank.html into the run's folder.

    run: a run's folder, or an adapter's. Raises FileError for an adapter that cannot be read or has no rank, ConfigError for
    settings that do not fit it, DataError for records that cannot be read, BaseMismatch for another base.
    """
    return _Choosing(finished(run), config, on_event).go()


class _Choosing:
    def __init__(self, run: Finished, config: RankConfig, on_event: Callable[[Progress], None]) -> None:
        self.run, self.config, self.on_event = run, config, on_event
        self.ranks = _ranks(config.ranks, run)
        self.others = [finished(path.strip()) for path in config.against.split(",") if path.strip()]
        self.folder = Path(config.out) if config.out is not None else run.folder
        self.spectra = spectra_of(run.triples)

    def go(self) -> RankChoice:
        alike_to = [alike(self.run, other) | {"with": f"{other.path} (r = {other.rank})"} for other in self.others]
        if self.config.confirm:
            check_confirmable(self.run)
        self.held = self._opened()
        self.model = self.held.loaded.model
        self._name_layers()
        self._encode()
        base = self._base()
        cuts = {rank: self._scored(f"r = {rank}", self._cut(rank)) for rank in self.ranks}
        choice = chosen({rank: cut.losses for rank, cut in cuts.items()}, self.config.margin)
        results = {
            "run": str(self.run.path),
            "settings": dict(self.run.settings),
            "options": to_mapping(self.config),
            "environment": machine.describe(),
            "records": self._records_used(),
            "loop": _loop_of(self.run),
            "base": base and _beside(*base, cuts[self.ranks[-1]].losses),
            "rank": choice.rank,
            "margin": choice.margin,
            "ranks": self._rows(cuts, choice),
            "allocated": self._allocations(cuts, choice.rank),
            "layers": [_layer(self.run.file.shown(name), own) for name, own in self.spectra.items()],
            "amplified": amplifications(self.model, self.run, choice.rank),
            "alike": alike_to,
            "confirmed": None,
        }
        self._write(results)
        if self.config.confirm and choice.rank != self.run.rank:
            self.model = None
            del self.held  # one model in memory
            results["confirmed"] = confirmed(
                self.run, self.config, choice.rank, self.folder / CONFIRMED, self._confirming
            )
            self._write(results)
        return RankChoice(choice.rank, choice, self.folder / REPORT, results)

    def _write(self, results: dict[str, Any]) -> None:
        write_text(self.folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_report(rank_report(results), self.folder / REPORT)

    def _confirming(self, event: SweepProgress) -> None:
        self.on_event(Progress("confirming", {"kind": event.kind, **event.values}))

    # --- the model and its records ------------------------------------------------------------------------------

    def _opened(self) -> HeldOut:
        run, config = self.run, self.run.config()
        model = self.config.model or run.named("model")
        records = self.config.records
        data = self.config.data or run.named("data") or (records if records and is_path(records) else None)
        problems = []
        if model is None:
            problems.append("the base model: name it with --model")
        if data is None:
            problems.append("the records: give held-out ones as a file with --records")
        if model is None or data is None:
            raise ConfigError(f"{run.adapter} does not say what it was trained on:", problems)
        if records is not None:
            config = dataclasses.replace(config, valid=records)
        held = held_out(model, data, config, self.config.most)
        loaded = equip(held.loaded, run.adapter)
        attach.detach(loaded.model)
        return dataclasses.replace(held, loaded=loaded)

    def _name_layers(self) -> None:
        """As this version of the model's code has them."""
        file = renamed(self.run.file, dict(tree.base_modules(self.model)))
        if file.factors.keys() != self.run.file.factors.keys():
            self.run = dataclasses.replace(self.run, file=file, triples=triples_of(file, self.run.adapter))
            self.spectra = spectra_of(self.run.triples)

    def _encode(self) -> None:
        data, loaded = self.held.config.data, self.held.loaded
        self.metrics = [m for m in metrics_for(self.config.metrics, data, self.held.records.form) if m != "loss"]
        encoded = task_of(data).encode(self.held.records, loaded, data)
        self.examples, self.kept = encoded.examples, self.held.records.only(encoded.records).items
        if len(items_in(self.kept)) < 2:
            raise DataError(
                f"The held-out set has {described(self.kept)}, and an interval needs two: give others with --records."
            )

    def _records_used(self) -> dict[str, Any]:
        own = self.config.records is None
        return {
            "count": len(self.examples),
            "items": len(items_in(self.kept)),
            "what": described(self.kept),
            "overlap": self.held.sets.overlap,
            "source": self.config.records or "held out by the run",
            "stopped_by": own and self.held.config.patience is not None,
        }

    # --- scores -------------------------------------------------------------------------------------------------

    def _cut(self, rank: int) -> LoRAFile:
        return truncated(self.run.file, self.run.triples, self._uniform(rank))

    def _uniform(self, rank: int) -> dict[str, int]:
        return {layer: min(rank, len(own.values)) for layer, own in self.spectra.items()}

    def _base(self) -> tuple[Measured, dict[str, Any]] | None:
        """Scores without any adapter; None where the model has no head of its own."""
        if self.held.loaded.untrained:
            return None
        losses, scores = self._scores()
        self.on_event(Progress("scored", {"name": "base", "loss": losses.value}))
        return losses, scores

    def _scored(self, name: str, cut: LoRAFile) -> _Cut:
        placed = store.place(self.model, cut, self.run.adapter, name="cut", check_base=False)
        try:
            with using(self.model, placed):
                found = _Cut(cut, *self._scores())
        finally:
            attach.detach(self.model, placed)
        self.on_event(Progress("scored", {"name": name, "loss": found.losses.value}))
        return found

    def _scores(self) -> tuple[Measured, dict[str, Any]]:
        """Score the model as it stands: the loss, and the metrics."""
        held, generation = self.held, GenerateConfig(batch=max(16, self.held.config.batch))
        found = evaluate(
            self.model, held.loaded.tokenizer, held.records, held.config.data, generation, metrics=["loss", *self.metrics]
        )  # fmt: skip
        assert found.losses is not None
        sums, counts, items = (np.array(part) for part in found.losses)
        losses = of_losses(sums, counts, items)
        scores = {name: found.scores[name].plain() for name in self.metrics}
        return losses, {name: {**score, "seeds": [score["value"]]} for name, score in scores.items()}

    # --- what they come to --------------------------------------------------------------------------------------

    def _rows(self, cuts: Mapping[int, _Cut], choice: Choice) -> list[dict[str, Any]]:
        costs, total = self._costs(list(cuts)), sum(own.norm**2 for own in self.spectra.values())
        found = []
        for tested in choice.tested:
            cut = cuts[tested.rank]
            kept = sum(own.energy(tested.rank) * own.norm**2 for own in self.spectra.values())
            parameters, size = parameters_of(cut.file), peft.size(cut.file)
            found.append({
                **dataclasses.asdict(tested), "energy": kept / total if total else 1.0, "parameters": parameters, "bytes": size,
                "bytes_with_optimizer": size + ADAM_STATE * parameters, "scores": cut.scores,
                "parts": shortened(cut.losses.parts[0]), **costs.get(tested.rank, {}),
            })  # fmt: skip
        return found

    def _costs(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        """What training at each rank would take, where the run says how it was trained."""
        config = self.held.config
        length = max(2, *(example.length for example in self.examples))
        try:
            method = self.run.method()
            if not isinstance(method.targets, str):
                return {}
            settings = PlanConfig(
                task=config.data.task, labels=len(config.data.labels or [0, 1]), batch=config.micro_batch or config.batch,
                length=length, dtype=config.dtype, device="cuda" if self.model.device.type == "cuda" else "cpu",
                optimizer=config.optimizer, gradient_checkpointing=config.gradient_checkpointing,
            )  # fmt: skip
            methods = {str(rank): dataclasses.replace(method, rank=rank) for rank in ranks}
            rows = plan(self.model.config, settings, methods).rows
        except DeltaWError as error:
            log.debug("The cost of training at each rank cannot be told: %s", error)
            return {}
        return {
            int(row.name): {
                "memory": row.memory.total,
                "flops_per_token": row.flops_per_token,
                "length": padded(length),
            }
            for row in rows
        }

    def _allocations(self, cuts: Mapping[int, _Cut], rank: int) -> list[dict[str, Any]]:
        """The recommended rank's parameters, and those of the next smaller one, spent where a parameter keeps the most of ΔW,
        against the same number spent evenly."""
        smaller = [r for r in self.ranks if r < rank][-1:]
        found = []
        for each in (*smaller, rank):
            even = self._uniform(each)
            ranks = allocated(self.spectra, sum(n * self.spectra[layer].cost for layer, n in even.items()))
            if ranks == even:
                continue
            cut = self._scored(f"r = {each}, allocated", truncated(self.run.file, self.run.triples, ranks))
            difference = cut.losses.less(cuts[each].losses).interval()
            found.append({
                "rank": each, "parameters": parameters_of(cut.file), "loss": cut.losses.interval().plain(),
                "difference": difference.plain(), "better": difference.high < 0, "ranks": ranks,
                "bytes": peft.size(cut.file),
            })  # fmt: skip
        return found


@dataclass(frozen=True)
class _Cut:
    """An adapter of fewer directions, and what it scores."""

    file: LoRAFile
    losses: Measured
    scores: dict[str, Any]


def _beside(base: Measured, scores: Mapping[str, Any], adapter: Measured) -> dict[str, Any]:
    """What the base scores, and its loss less the whole adapter's, item by item."""
    return {"loss": base.value, "scores": dict(scores), "less_adapter": base.less(adapter).interval().plain()}


def _ranks(text: str, run: Finished) -> list[int]:
    """Rising, the adapter's own last. Raises ConfigError."""
    own = run.rank
    if not text:
        return [*(2**i for i in range(own.bit_length()) if 2**i < own), own]
    problems: list[str] = []
    found = numbers(text, int, "ranks", problems)
    problems += [f"ranks: {rank} is more than the adapter has ({own})" for rank in found if rank > own]
    if problems:
        raise ConfigError("The adapter cannot be cut to these ranks:", problems)
    return sorted({*found, own})


def _layer(name: str, own: Spectrum) -> dict[str, Any]:
    return {
        "layer": name, "shape": list(own.shape), "norm": own.norm, "effective_rank": own.effective_rank,
        "rank_90": own.rank_for(0.9), "rank_99": own.rank_for(0.99), "values": [float(f"{v:.{_DIGITS}g}") for v in own.values],
    }  # fmt: skip


def _loop_of(run: Finished) -> dict[str, Any]:
    """What the run's result says of its training; nothing of an adapter alone."""
    path = run.folder / "result.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("loop", {}) if path.is_file() else {}
    return found


def check_confirmable(run: Finished) -> None:
    """Raises ConfigError for a run that a sweep cannot repeat."""
    method, problems = run.method(), []
    if not isinstance(method.targets, str) or "=" in method.targets:
        problems.append(f"targets is {method.targets!r}; a sweep has one rank for all layers")
    if method.tokens or method.norms:
        problems.append("tokens or norms were trained too")
    problems += [f"its {key} is not a file, folder or hub name" for key in ("model", "data") if run.named(key) is None]
    if problems:
        raise ConfigError(f"{run.path} cannot be confirmed by training again:", problems)


def confirmed(
    run: Finished, config: RankConfig, rank: int, folder: Path, on_event: Callable[[SweepProgress], None]
) -> dict[str, Any]:
    """`rank` and the adapter's own, trained as the run was, scored on other records than those that chose."""
    method, model, data = run.method(), config.model or run.named("model"), config.data or run.named("data")
    assert model is not None and data is not None
    options = SweepConfig(
        ranks=f"{run.rank},{rank}", targets=str(method.targets), seeds=config.seeds, scaling=method.scaling, alpha=method.alpha,
        init=method.init, dropout=method.dropout, margin=config.margin, metrics=config.metrics,
        method="dora" if run.settings.get("method") == "dora" else "lora",
    )  # fmt: skip
    training: TrainConfig = dataclasses.replace(run.config(), out=str(folder), overwrite=False)
    done = sweep(model, data, training, options, on_event=on_event)
    choice = next(iter(done.choices.values()), None)
    if choice is None:
        return {"failed": "; ".join(row["error"] for row in done.results["rows"] if "error" in row)}
    small, large = choice.tested
    return {
        "held": small.enough, "rank": rank, "full": run.rank, "loss": dataclasses.asdict(small.loss),
        "full_loss": dataclasses.asdict(large.loss), "difference": dataclasses.asdict(small.difference),
        "margin": choice.margin, "seeds": config.seeds, "report": str(done.report),
    }  # fmt: skip
