"""The candidates of a sweep: ranks and targets, or targets with the ranks that a budget of parameters allows; and how many of
them share one pass over their base. Knows settings, shapes and memory; trains nothing."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from deltaw.config import SweepConfig
from deltaw.errors import AdapterError, ConfigError, TargetError
from deltaw.layers.ops.seeding import seeded
from deltaw.layers.tree import evaluating
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA
from deltaw.model import attach
from deltaw.model.switch import route
from deltaw.runs.memory import machine
from deltaw.runs.memory.expected import expected
from deltaw.training.prepare import Prepared
from deltaw.training.tasks import task_of

# The choices of targets that Table 5 of the paper compares
BUDGETED = "q;v;q,v;q,k,v,o;mlp;all-linear"
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Candidate:
    """One rank on one choice of targets."""

    targets: str
    rank: int
    method: LoRA

    @property
    def name(self) -> str:
        """The candidate in messages and tables."""
        return f"r = {self.rank}, {self.targets}"

    @property
    def alpha(self) -> float:
        """Its α, which a candidate always says."""
        assert self.method.alpha is not None
        return self.method.alpha


@dataclass(frozen=True)
class Tried:
    """All candidates of a sweep."""

    candidates: list[Candidate]
    """Candidates in the order of the settings."""
    left_out: dict[str, str]
    """Targets whose layers cannot hold the budget → why."""


def candidates(options: SweepConfig, model: nn.Module) -> Tried:
    """Return what a sweep tries. Nothing is trained, and the model is only read.

    model: any with the base's shapes. Raises ConfigError with everything wrong. Raises TargetError for targets that match no
    layer or do not fit a rank, and where no choice of targets can hold the budget.
    """
    problems: list[str] = []
    ranks = numbers(options.ranks, int, "ranks", problems)
    learning_rates(options, 1.0, problems)
    count = None if options.budget is None else _count(options.budget, problems)
    if problems:
        raise ConfigError("This sweep cannot be made:", problems)
    choices = choices_of_targets(options)
    if count is not None:
        return _of_budget(count, options, choices, ranks[0], model)
    tried = [_candidate(options, targets, rank, ranks[0]) for targets in choices for rank in ranks]
    with seeded(0):  # what is drawn here is thrown away
        for candidate in tried:
            candidate.method.plan(model)  # what does not fit is said before anything is trained
    return Tried(tried, {})


def choices_of_targets(options: SweepConfig) -> list[str]:
    """Return the choices of targets, each once, in the order given."""
    text = options.targets or (BUDGETED if options.budget is not None else "all-linear")
    return list(dict.fromkeys(part.strip() for part in text.split(";") if part.strip()))


def learning_rates(options: SweepConfig, lr: float, problems: list[str] | None = None) -> list[float]:
    """Return the learning rates to try: `lr` alone where the options name none. What is wrong with them goes to `problems`."""
    rates = numbers(options.lrs, float, "lrs", [] if problems is None else problems) if options.lrs else []
    return rates or [lr]


def _candidate(options: SweepConfig, targets: str, rank: int, first_rank: int) -> Candidate:
    alpha = float(first_rank) if options.alpha is None else options.alpha
    kind = DoRA if options.method == "dora" else LoRA
    method = kind(
        rank=rank, alpha=alpha, targets=targets, init=options.init, dropout=options.dropout, scaling=options.scaling
    )
    return Candidate(targets, rank, method)


def numbers(text: str, kind: Callable[[str], Number], what: str, problems: list[str]) -> list[Number]:
    """Return the numbers of a list with commas, each above 0 and there once.

    kind: int or float. what: the setting, for messages. problems: gets what is wrong with the list.
    """
    parsed: list[Number] = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        try:
            value = kind(word)
        except ValueError:
            value = kind("0")
        if not 0 < value < float("inf"):
            problems.append(f"{what}: {word!r} is not {'a whole number' if kind is int else 'a number'} above 0")
        elif value in parsed:
            problems.append(f"{what}: {word} is there twice")
        else:
            parsed.append(value)
    if not parsed and not problems:
        problems.append(f"{what}: there is none")
    return parsed


def _count(text: str, problems: list[str]) -> int:
    """Return a number of parameters written as 500000, 500k or 0.5M."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMB]?)\s*", text)
    if match is None or not (count := round(float(match[1]) * _UNITS[match[2]])):
        problems.append(f"budget: {text!r} is not a number of parameters; write 500000, 500k or 0.5M")
        return 0
    return count


def _of_budget(count: int, options: SweepConfig, choices: Sequence[str], first_rank: int, model: nn.Module) -> Tried:
    """Return a candidate of about `count` parameters for each choice of targets whose layers can hold them."""
    tried, left_out = [], {}
    for targets in choices:
        rank, fits = _rank_for(count, options, targets, model)
        if fits:
            tried.append(_candidate(options, targets, rank, first_rank))
        else:
            left_out[targets] = f"{count:,} parameters would be r = {rank}, more than its layers have rows or columns"
    if not tried:
        reasons = [f"{targets}: {why}" for targets, why in left_out.items()]
        raise TargetError("No choice of targets can hold this budget:", reasons)
    return Tried(tried, left_out)


def _rank_for(count: int, options: SweepConfig, targets: str, model: nn.Module) -> tuple[int, bool]:
    """Return the rank, at least 1, whose parameters are nearest to `count`, and whether the layers have room for it."""

    @functools.cache
    def size(rank: int) -> int | None:
        return _parameters(_candidate(options, targets, rank, 1), model)

    rank, before = 1, set[int]()
    # Parameters are proportional to the rank, except that a preset leaves out layers smaller than it: so go until it repeats
    while rank not in before:
        before.add(rank)
        parameters = size(rank)
        if parameters is None:
            return rank, False
        rank = max(1, round(rank * count / parameters))
    sizes = {near: size(near) for near in (rank - 1, rank, rank + 1) if near}
    near = {rank: parameters for rank, parameters in sizes.items() if parameters is not None}
    return min(near, key=lambda rank: abs(near[rank] - count)), True


def _parameters(candidate: Candidate, model: nn.Module) -> int | None:
    """Return the number of trained values; None where a layer is too small for the rank."""
    try:
        with seeded(0):
            updates = list(candidate.method.plan(model).updates.values())
    except TargetError:
        if candidate.rank == 1:
            raise
        return None
    parameters = {id(p): p for update in updates for p in update.parameters()}
    return sum(p.numel() for p in parameters.values())


# Share of the free memory that candidates may take; the rest is for what is not foreseen
_USED = 0.8


def width_of(asked: int | None, largest: Prepared) -> tuple[int, str]:
    """Return how many candidates share a pass over the base, and why.

    asked: the width that was asked for. largest: the candidate with the most parameters. Raises AdapterError where several were
    asked for and the model does not keep the rows of a batch apart.
    """
    first = next(largest.loaded.model.parameters())
    if first.dtype == torch.float16:
        return 1, "in float16 each has a loss scale of its own"
    if largest.config.frozen_dtype == "int8":
        return 1, "products in int8 are of one adapter's rows"
    if asked is not None:
        if asked > 1 and (error := _mixed_rows(largest)) is not None:
            raise AdapterError(
                f"{asked} candidates cannot share a pass over this model; leave --abreast out. {error}"
            ) from error
        return asked, "as asked for"
    if first.device.type == "cpu":
        return 1, "a CPU is bound by arithmetic"
    if largest.config.gradient_checkpointing:
        return 1, "a GPU's checkpointing sees one adapter at a time"
    if _mixed_rows(largest) is not None:
        return 1, "this model does not keep the rows of a batch apart"
    memory, room = expected(largest), machine.free(first.device)
    if memory is None or room is None:
        return 1, "the memory of a pass cannot be told beforehand"
    parts = memory.memory
    one = parts.adapter + parts.gradients + parts.optimizer + parts.activations + parts.working
    return max(1, int(room * _USED) // one), "as many as the memory holds"


def _mixed_rows(prepared: Prepared) -> AdapterError | None:
    """Return why the rows of a batch cannot have different adapters on this model, by a pass of two rows; None where they can."""
    model, config = prepared.loaded.model, prepared.config
    device, names = next(model.parameters()).device, ["0", "1"]
    method = dataclasses.replace(prepared.method, rank=1, alpha=None, init="gaussian")
    loss, examples = task_of(config.data).loss(prepared.loaded), prepared.encoded.examples
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad(), evaluating(model):
        loss(loss.collate(examples[:1]))  # its first call, which tries the ways to the loss
        try:
            for name in names:
                attach.attach(model, method, name=name)
            with route(model, names):
                loss.each(loss.collate([examples[0], examples[-1]]))
        except AdapterError as error:
            return error
        finally:
            attach.detach(model)
    return None
