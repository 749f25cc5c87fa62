"""The rank that a finished run's data needed, from its one adapter: cut to each smaller rank, scored on held-out records and
compared in pairs; and which directions there are. Prints nothing; it emits events.

Cutting and scoring are of the very file that `compress` would write.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from deltaw.config import (
    DataConfig,
    GenerateConfig,
    PlanConfig,
    RankConfig,
    SweepConfig,
    TrainConfig,
    check_is,
    to_mapping,
)
from deltaw.data import Record
from deltaw.data.batches import padded
from deltaw.data.prompts import described, items_in
from deltaw.data.sources import is_path
from deltaw.errors import ConfigError, DataError, DeltaWError
from deltaw.files import store, units
from deltaw.files.compress import Spectrum, allocated, spectra_of, triples_of, truncated
from deltaw.files.formats import peft
from deltaw.files.formats.atomic import check_apart, write_text
from deltaw.files.formats.peft import LoRAFile
from deltaw.files.renames import renamed
from deltaw.layers import tree
from deltaw.model import attach
from deltaw.model.switch import using
from deltaw.progress import Runs, named, say, shown, tell
from deltaw.runs.candidates import numbers
from deltaw.runs.directions import alike, amplifications
from deltaw.runs.evaluation.bootstrap import (
    ERROR_RATE,
    Choice,
    Measured,
    chosen,
    errors_of,
    of_losses,
    of_one_run,
    shortened,
)
from deltaw.runs.evaluation.card import Card
from deltaw.runs.evaluation.evaluate import evaluate
from deltaw.runs.evaluation.metrics import limits
from deltaw.runs.events import Confirming, RankEvent, Scored, SweepEvent
from deltaw.runs.folder import Finished, finished, parameters_of, read_json
from deltaw.runs.memory import machine
from deltaw.runs.memory.plan import plan
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.reports.rank import rank_report
from deltaw.runs.results import JsonObject
from deltaw.runs.results.rank import (
    Allocated,
    Confirmed,
    Cost,
    LayerSpectrum,
    NotConfirmed,
    RankResults,
    RankRow,
    RecordsUsed,
    ScoresOfBase,
)
from deltaw.runs.results.scores import SeedScores
from deltaw.runs.resume.place import RunFolder
from deltaw.runs.study import metrics_for
from deltaw.runs.sweep import sweep
from deltaw.training.opening import equip
from deltaw.training.optim import ADAM_STATE
from deltaw.training.prepare import HeldOut, held_out
from deltaw.training.tasks import task_of

log = logging.getLogger("deltaw")

_RESULTS, _REPORT, _CONFIRMED = "rank.json", "rank.html", "confirmed"
_DIGITS = 6


@dataclass(frozen=True, repr=False)
class RankChoice(Card):
    """The result of `choose_rank`.

    >>> import deltaw
    >>> config = deltaw.TrainConfig(out="chosen", steps=3, valid_share=0.25, samples=0, valid_most=6, overwrite=True)
    >>> result = deltaw.train("model", "train.jsonl", config, method=deltaw.LoRA(rank=2, targets="q"))
    >>> choice = deltaw.choose_rank(result.folder)
    >>> [(row.rank, row.parameters) for row in choice.outcome.ranks]
    [(1, 128), (2, 256)]
    """

    rank: int
    """The smallest rank that is enough."""
    choice: Choice
    """The tests that say so."""
    report: Path
    """The page about it."""
    outcome: RankResults
    """Each rank's loss and cost, the spectrum of each layer, and whether training again confirmed the choice."""

    def card(self) -> tuple[str, dict[str, str]]:
        """Return the rank that is enough, its scores, and the place, in a few lines."""
        outcome, row = self.outcome, self.outcome.recommended
        rows = {
            "held-out loss": f"{row.tested.loss} on {outcome.records.what}",
            f"r = {outcome.largest.rank}": str(outcome.largest.tested.loss),
            "tried": ", ".join(f"r = {row.rank}" for row in outcome.ranks),
            "adapter": f"{row.parameters:,} parameters, {units.size(row.bytes)}",
            "report": str(self.report),
        }
        return f"r = {self.rank} is enough for {outcome.run}", rows

    @property
    def results(self) -> JsonObject:
        """The plain values of rank.json."""
        return self.outcome.to_json()


def choose_rank(
    run: str | Path,
    config: RankConfig = RankConfig(),  # noqa: B008  (frozen)
    *,
    progress: bool = True,
    on_event: Callable[[RankEvent], None] = lambda event: None,
) -> RankChoice:
    """Cut the adapter of a finished run to smaller ranks, and recommend the smallest that is enough.

    Each rank is scored on records that the adapter was not trained on. A rank is enough if its loss is, with 95% confidence, not
    worse than the whole adapter's by more than `config.margin` of it. rank.json and rank.html are written into the run's folder.

    Args:
        run: a run's folder, or an adapter's.
        config: which ranks, which records, and whether to confirm the choice by training again.
        progress: show what goes on: a line that moves in a terminal and a notebook, plain lines on standard error elsewhere.
        on_event: called with what happens, as `deltaw.runs.events` has it.

    Returns:
        The recommended rank, with its evidence.

    Raises:
        FileError: an adapter that cannot be read, or without a rank.
        ConfigError: settings that do not fit the adapter.
        DataError: records that cannot be used, or are too few.
        BaseMismatch: the adapter is of another base.

    >>> import deltaw
    >>> config = deltaw.TrainConfig(out="ranked", steps=3, valid_share=0.25, samples=0, valid_most=6, overwrite=True)
    >>> result = deltaw.train("model", "train.jsonl", config, method=deltaw.LoRA(rank=4, targets="q"))
    >>> choice = deltaw.choose_rank(result.folder, deltaw.RankConfig(ranks="1", margin=0.5))
    >>> choice.rank, [tested.rank for tested in choice.choice.tested], choice.report.name
    (1, [1, 4], 'rank.html')
    """
    check_is(config, RankConfig, "config")
    with shown(progress, "rank", on_event) as hear:
        return _chosen(run, config, hear)


def _chosen(run: str | Path, config: RankConfig, on_event: Callable[[RankEvent], None]) -> RankChoice:
    """Cut and score the run's adapter, write what came out, and confirm it where that is asked for."""
    say("reading the run")
    adapted = finished(run)
    ranks = _ranks(config.ranks, adapted)
    others = [finished(path.strip()) for path in config.against.split(",") if path.strip()]
    pairs = [alike(adapted, other, f"{other.path} (r = {other.rank})") for other in others]
    if config.confirm:
        check_confirmable(adapted)
    folder = Path(config.out) if config.out is not None else adapted.folder
    _check_apart(folder, adapted, others, config)
    choice, results = _cut_and_scored(adapted, config, ranks, on_event)  # leaves no model in memory
    results = dataclasses.replace(results, alike=pairs)
    _write(folder, results)
    if config.confirm and choice.rank != adapted.rank:
        confirmation = confirmed(adapted, config, choice.rank, folder / _CONFIRMED, lambda e: on_event(Confirming(e)))
        results = dataclasses.replace(results, confirmed=confirmation)
        _write(folder, results)
    return RankChoice(choice.rank, choice, folder / _REPORT, results)


def _check_apart(folder: Path, run: Finished, others: Sequence[Finished], config: RankConfig) -> None:
    """Raise ConfigError where the results would be written over or into what they are computed from."""
    inputs = {"the adapter": run.adapter, "the base": run.named("model"), "the data": run.named("data")}
    inputs |= {"the records": config.records} | {f"the adapter of {other.path}": other.adapter for other in others}
    for name in (_RESULTS, _REPORT, _CONFIRMED):
        check_apart(folder / name, inputs)


def _write(folder: Path, results: RankResults) -> None:
    write_text(folder / _RESULTS, json.dumps(results.to_json(), indent=1, ensure_ascii=False) + "\n")
    write_report(rank_report(results), folder / _REPORT)


def _ranks(text: str, run: Finished) -> list[int]:
    """Return the ranks to cut to, rising, the adapter's last; by default the powers of two. Raises ConfigError."""
    if not text:
        return [*(2**i for i in range(run.rank.bit_length()) if 2**i < run.rank), run.rank]
    problems: list[str] = []
    ranks = numbers(text, int, "ranks", problems)
    problems += [f"ranks: {rank} is more than the adapter has ({run.rank})" for rank in ranks if rank > run.rank]
    if problems:
        raise ConfigError("The adapter cannot be cut to these ranks:", problems)
    return sorted({*ranks, run.rank})


# --- the model and its records ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """A run's adapter beside its base, in memory, with the records that it is scored on."""

    run: Finished
    """The run, its layers named as this version of the model's code names them."""
    spectra: Mapping[str, Spectrum]
    held: HeldOut
    model: nn.Module
    records: Sequence[Record]
    """Records that could be encoded."""
    length: int
    """Tokens of the longest one, two at least."""
    metrics: Sequence[str]
    """Besides the loss."""

    @property
    def by(self) -> str:
        """The figure that decides: of classes the error rate, which is what such a model is for; else the loss."""
        return ERROR_RATE if task_of(self.held.config.data).answers == "class" else "loss"

    def uniform(self, rank: int) -> dict[str, int]:
        """Return one rank for all layers, as far as each layer has it."""
        return {layer: min(rank, len(spectrum.values)) for layer, spectrum in self.spectra.items()}

    def cut(self, ranks: Mapping[str, int]) -> LoRAFile:
        """Return the adapter cut to a rank for each layer."""
        return truncated(self.run.file, self.run.triples, ranks)


def _opened(run: Finished, config: RankConfig) -> _Opened:
    held = _held_out(run, config)
    model: nn.Module = held.loaded.model
    file = renamed(run.file, dict(tree.base_modules(model)))
    if file.factors.keys() != run.file.factors.keys():
        run = dataclasses.replace(run, file=file, triples=triples_of(file, run.adapter))
    data = held.config.data
    encoded = task_of(data).encode(held.records, held.loaded, data)
    records = held.records.only(encoded.records).items
    if len(items_in(records)) < 2:
        raise DataError(
            f"The held-out set has {described(records)}, and an interval needs two: give others with --records."
        )
    return _Opened(
        run=run,
        spectra=spectra_of(run.triples),
        held=held,
        model=model,
        records=records,
        length=max(2, *(example.length for example in encoded.examples)),
        metrics=_metrics(config, data, held.records.form),
    )


def _metrics(config: RankConfig, data: DataConfig, form: str) -> list[str]:
    """Return the metrics besides the loss; of classes the accuracy too, which decides."""
    metrics = [m for m in metrics_for(config.metrics, data, form) if m != "loss"]
    return metrics if task_of(data).answers != "class" or "accuracy" in metrics else [*metrics, "accuracy"]


def _settings_of(run: Finished, options: RankConfig) -> TrainConfig:
    """Return the run's settings of training. That the model's code may run is never taken from its files."""
    return dataclasses.replace(run.config(), trust_remote_code=options.trust_remote_code)


def _held_out(run: Finished, options: RankConfig) -> HeldOut:
    """Open the base with what the adapter brings for it, but without the adapter, and the records to score."""
    config, records = _settings_of(run, options), options.records
    model = options.model or run.named("model")
    data = options.data or run.named("data") or (records if records and is_path(records) else None)
    problems = []
    if model is None:
        problems.append("the base model: name it with --model")
    if data is None:
        problems.append("the records: give held-out ones as a file with --records")
    if model is None or data is None:
        raise ConfigError(f"{run.adapter} does not say what it was trained on:", problems)
    if records is not None:
        config = dataclasses.replace(config, valid=records)
    held = held_out(model, data, config, options.most)
    loaded = equip(held.loaded, run.adapter)
    attach.detach(loaded.model)
    return dataclasses.replace(held, loaded=loaded)


def _records_used(opened: _Opened, config: RankConfig) -> RecordsUsed:
    return RecordsUsed(
        count=len(opened.records),
        items=len(items_in(opened.records)),
        what=described(opened.records),
        overlap=opened.held.sets.overlap,
        source=config.records or "held out by the run",
        stopped_by=config.records is None and opened.held.config.patience is not None,
    )


# --- scores -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scores:
    """The scores of a model on the records."""

    losses: Measured
    """Error rates of classes, which decide about these."""
    metrics: dict[str, SeedScores]
    """Besides it."""


@dataclass(frozen=True)
class _Cut:
    """An adapter of fewer directions, and what it scores."""

    file: LoRAFile
    scores: _Scores


def _cut_and_scored(
    run: Finished, config: RankConfig, ranks: Sequence[int], on_event: Callable[[RankEvent], None]
) -> tuple[Choice, RankResults]:
    """Open the run's model, score the adapter at each rank, and choose one."""
    opened = _opened(run, config)
    tell(Runs(len(ranks) + (not opened.held.loaded.untrained)))
    base = _base_scores(opened, on_event)
    cuts = {rank: _cut(opened, f"r = {rank}", opened.cut(opened.uniform(rank)), on_event) for rank in ranks}
    whole = cuts[ranks[-1]].scores.losses
    losses = {rank: cut.scores.losses for rank, cut in cuts.items()}
    choice = chosen(losses, config.margin, task_of(opened.held.config.data).least_margin, by=opened.by)
    result = read_json(RunFolder(run.folder).result) or {}  # an adapter alone has none
    results = RankResults(
        run=str(run.path),
        settings=dict(run.settings),
        options=to_mapping(config),
        environment=machine.describe(),
        records=_records_used(opened, config),
        loop=result.get("loop", {}),
        warnings=result.get("warnings", []),
        base=None
        if base is None
        else ScoresOfBase(base.losses.value, base.metrics, base.losses.less(whole).interval()),
        rank=choice.rank,
        margin=choice.margin,
        by=choice.by,
        ranks=_rows(opened, cuts, choice),
        allocated=_allocations(opened, cuts, choice.rank, on_event),
        layers=[_layer(opened.run.file.shown(name), spectrum) for name, spectrum in opened.spectra.items()],
        amplified=amplifications(opened.model, opened.run, choice.rank),
        alike=[],
        confirmed=None,
    )
    return choice, results


def _base_scores(opened: _Opened, on_event: Callable[[RankEvent], None]) -> _Scores | None:
    """Score the model without the adapter; None where its head is untrained."""
    if opened.held.loaded.untrained:
        return None
    with named(lambda _: "base"):
        scores = _scores(opened)
    on_event(Scored("base", scores.losses.value, opened.by))
    return scores


def _cut(opened: _Opened, name: str, file: LoRAFile, on_event: Callable[[RankEvent], None]) -> _Cut:
    """Score the model with this file's adapter."""
    placed = store.place(opened.model, file, opened.run.adapter, name="cut", check_base=False)
    try:
        with using(opened.model, placed), named(lambda _: name):
            cut = _Cut(file, _scores(opened))
    finally:
        attach.detach(opened.model, placed)
    on_event(Scored(name, cut.scores.losses.value, opened.by))
    return cut


def _scores(opened: _Opened) -> _Scores:
    """Score the model as it stands."""
    held, generation = opened.held, GenerateConfig(batch=max(16, opened.held.config.batch))
    evaluation = evaluate(
        opened.model, held.loaded.tokenizer, held.records, held.config.data, generation, metrics=["loss", *opened.metrics]
    )  # fmt: skip
    assert evaluation.losses is not None
    sums, counts, items = (np.array(part) for part in evaluation.losses)
    metrics = {name: evaluation.scores[name] for name in opened.metrics}
    if opened.by == ERROR_RATE:
        accuracy = evaluation.scores["accuracy"]
        losses = errors_of(of_one_run(accuracy, limits("accuracy")))
        metrics = {"loss": evaluation.scores["loss"]} | metrics
    else:
        losses = of_losses(sums, counts, items)
    return _Scores(
        losses,
        {name: SeedScores([score.value], score.value, score.low, score.high) for name, score in metrics.items()},
    )


# --- results ------------------------------------------------------------------------------------------------------


def _rows(opened: _Opened, cuts: Mapping[int, _Cut], choice: Choice) -> list[RankRow]:
    spectra, costs = list(opened.spectra.values()), _costs(opened, list(cuts))
    total = sum(spectrum.norm**2 for spectrum in spectra)
    rows = []
    for tested in choice.tested:
        cut = cuts[tested.rank]
        kept = sum(spectrum.energy(tested.rank) * spectrum.norm**2 for spectrum in spectra)
        parameters, size = parameters_of(cut.file), peft.size(cut.file)
        rows.append(RankRow(
            tested=tested, energy=kept / total if total else 1.0, parameters=parameters, bytes=size,
            bytes_with_optimizer=size + ADAM_STATE * parameters, scores=cut.scores.metrics,
            parts=shortened(cut.scores.losses.parts[0]), cost=costs.get(tested.rank),
        ))  # fmt: skip
    return rows


def _costs(opened: _Opened, ranks: Sequence[int]) -> dict[int, Cost]:
    """Return what training takes, by rank; nothing where the run does not say how it was trained."""
    config = opened.held.config
    try:
        method = opened.run.method()
        if not isinstance(method.targets, str):
            return {}
        settings = PlanConfig(
            task=config.data.task, labels=len(config.data.labels or [0, 1]), batch=config.micro_batch or config.batch,
            length=opened.length, dtype=config.dtype, device="cuda" if _device(opened.model) == "cuda" else "cpu",
            optimizer=config.optimizer, gradient_checkpointing=config.gradient_checkpointing,
        )  # fmt: skip
        methods = {str(rank): dataclasses.replace(method, rank=rank) for rank in ranks}
        planned = {row.name: row for row in plan(opened.held.loaded.model.config, settings, methods).rows}
    except DeltaWError as error:
        log.debug("The cost of training at each rank cannot be told: %s", error)
        return {}
    rows = {rank: planned[str(rank)] for rank in ranks if str(rank) in planned}
    length = padded(opened.length)
    return {rank: Cost(row.memory.total, row.flops_per_token, length) for rank, row in rows.items()}


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _allocations(
    opened: _Opened, cuts: Mapping[int, _Cut], rank: int, on_event: Callable[[RankEvent], None]
) -> list[Allocated]:
    """Spend the recommended rank's parameters, and those of the next smaller one, where a parameter keeps the most of ΔW, and
    compare with the same number spent evenly."""
    smaller = [other for other in cuts if other < rank][-1:]
    rows = []
    for of in (*smaller, rank):
        even = opened.uniform(of)
        ranks = allocated(opened.spectra, sum(n * opened.spectra[layer].cost for layer, n in even.items()))
        if ranks == even:
            continue
        cut = _cut(opened, f"r = {of}, allocated", opened.cut(ranks), on_event)
        losses = cut.scores.losses
        difference = losses.less(cuts[of].scores.losses).interval()
        rows.append(Allocated(
            rank=of, parameters=parameters_of(cut.file), loss=losses.interval(), difference=difference,
            better=difference.high < 0, ranks=ranks, bytes=peft.size(cut.file),
        ))  # fmt: skip
    return rows


def _layer(name: str, spectrum: Spectrum) -> LayerSpectrum:
    values = [float(f"{value:.{_DIGITS}g}") for value in spectrum.values]
    return LayerSpectrum(
        name, list(spectrum.shape), spectrum.norm, spectrum.effective_rank, spectrum.rank_for(0.9), spectrum.rank_for(0.99),
        values,
    )  # fmt: skip


# --- confirmed by training again ----------------------------------------------------------------------------------


def check_confirmable(run: Finished) -> None:
    """Raise ConfigError for a run that a sweep cannot repeat."""
    method, problems = run.method(), []
    if not isinstance(method.targets, str) or "=" in method.targets:
        problems.append(f"targets is {method.targets!r}; a sweep has one rank for all layers")
    if method.tokens or method.norms:
        problems.append("tokens or norms were trained too")
    problems += [f"its {key} is not a file, folder or hub name" for key in ("model", "data") if run.named(key) is None]
    if problems:
        raise ConfigError(f"{run.path} cannot be confirmed by training again:", problems)


def confirmed(
    run: Finished, config: RankConfig, rank: int, folder: Path, on_event: Callable[[SweepEvent], None]
) -> Confirmed | NotConfirmed:
    """Train at `rank` and at the adapter's own, as the run was, and score on other records than those that chose."""
    method, model, data = run.method(), config.model or run.named("model"), config.data or run.named("data")
    assert model is not None and data is not None
    options = SweepConfig(
        ranks=f"{run.rank},{rank}", targets=str(method.targets), seeds=config.seeds, scaling=method.scaling, alpha=method.alpha,
        init=method.init, dropout=method.dropout, margin=config.margin, metrics=config.metrics,
        method="dora" if run.settings.get("method") == "dora" else "lora",
    )  # fmt: skip
    training = dataclasses.replace(_settings_of(run, config), out=str(folder), overwrite=False)
    result = sweep(model, data, training, options, on_event=on_event)
    choice = next(iter(result.choices.values()), None)
    if choice is None:
        return NotConfirmed("; ".join(failed.error for _, failed in result.outcome.failed))
    small, large = choice.tested
    return Confirmed(
        held=small.enough, rank=rank, full=run.rank, loss=small.loss, full_loss=large.loss, difference=small.difference,
        margin=choice.margin, seeds=config.seeds, report=str(result.report),
    )  # fmt: skip
