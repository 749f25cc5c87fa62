"""The candidates of a sweep: ranks and targets, or targets with the ranks that a budget of parameters allows; and how many of
them share one pass over their base. Knows settings, shapes and memory; trains nothing."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

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

# Table 5 of the paper compares the like
BUDGETED = "q;v;q,v;q,k,v,o;mlp;all-linear"
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Candidate:
    """One rank on one choice of targets."""

    targets: str
    rank: int
    method: LoRA

    @property
    def name(self) -> str:
        return f"r = {self.rank}, {self.targets}"


@dataclass(frozen=True)
class Tried:
    """What a sweep is made of."""

    candidates: list[Candidate]
    """In the order in which they are given."""
    left_out: dict[str, str]
    """Targets whose layers cannot hold the budget → why."""


def candidates(options: SweepConfig, model: Any) -> Tried:
    """`model`: any with the base's shapes. Raises ConfigError with everything wrong, and TargetError for targets that there are
    not, that a rank does not fit, or of which none can hold the budget."""
    problems: list[str] = []
    ranks = numbers(options.ranks, int, "ranks", problems)
    learning_rates(options, 1.0, problems)
    count = None if options.budget is None else _count(options.budget, problems)
    if problems:
        raise ConfigError("This sweep cannot be made:", problems)
    targets = choices(options)
    if count is not None:
        return _of_budget(count, options, targets, ranks[0], model)
    found = [_made(options, each, rank, ranks[0]) for each in targets for rank in ranks]
    with seeded(0):  # what is drawn here is thrown away
        for candidate in found:
            candidate.method.plan(model)  # what does not fit is said before anything is trained
    return Tried(found, {})


def choices(options: SweepConfig) -> list[str]:
    """Of targets."""
    text = options.targets or (BUDGETED if options.budget is not None else "all-linear")
    return list(dict.fromkeys(part.strip() for part in text.split(";") if part.strip()))


def learning_rates(options: SweepConfig, lr: float, problems: list[str] | None = None) -> list[float]:
    """Those to try; `lr` where none are given."""
    found = numbers(options.lrs, float, "lrs", [] if problems is None else problems) if options.lrs else []
    return found or [lr]


def _made(options: SweepConfig, targets: str, rank: int, first: int) -> Candidate:
    kind = DoRA if options.method == "dora" else LoRA
    settings = {"init": options.init, "dropout": options.dropout, "scaling": options.scaling}
    alpha = float(first) if options.alpha is None else options.alpha
    return Candidate(targets, rank, kind(rank=rank, alpha=alpha, targets=targets, **settings))  # type: ignore[arg-type]


def numbers(text: str, kind: type, what: str, problems: list[str]) -> list[Any]:
    """Those of a list with commas, each once and above 0; what is wrong with it goes to `problems`."""
    found: list[Any] = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        try:
            value = kind(word)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            problems.append(f"{what}: {word!r} is not {'a whole number' if kind is int else 'a number'} above 0")
        elif value in found:
            problems.append(f"{what}: {word} is there twice")
        else:
            found.append(value)
    if not found and not problems:
        problems.append(f"{what}: there is none")
    return found


def _count(text: str, problems: list[str]) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMB]?)\s*", text)
    if match is None or not (count := round(float(match[1]) * _UNITS[match[2]])):
        problems.append(f"budget: {text!r} is not a number of parameters; write 500000, 500k or 0.5M")
        return 0
    return count


def _of_budget(count: int, options: SweepConfig, targets: Sequence[str], first: int, model: Any) -> Tried:
    found, left_out = [], {}
    for each in targets:
        rank, fits = _rank_for(count, options, each, model)
        if fits:
            found.append(_made(options, each, rank, first))
        else:
            left_out[each] = f"{count:,} parameters would be r = {rank}, more than its layers have rows or columns"
    if not found:
        reasons = [f"{each}: {why}" for each, why in left_out.items()]
        raise TargetError("No choice of targets can hold this budget:", reasons)
    return Tried(found, left_out)


def _rank_for(count: int, options: SweepConfig, targets: str, model: Any) -> tuple[int, bool]:
    """The rank whose parameters are nearest to `count`, at least 1, and whether the layers have room for it."""

    @functools.cache
    def size(rank: int) -> int | None:
        return _parameters(_made(options, targets, rank, 1), model)

    rank, before = 1, set[int]()
    while rank not in before:  # in proportion, but that a preset leaves out layers that are smaller than the rank
        before.add(rank)
        own = size(rank)
        if own is None:
            return rank, False
        rank = max(1, round(rank * count / own))
    near = {each: own for each in (rank - 1, rank, rank + 1) if each and (own := size(each)) is not None}
    return min(near, key=lambda each: abs(near[each] - count)), True


def _parameters(candidate: Candidate, model: Any) -> int | None:
    """None where a layer is too small for the rank."""
    try:
        with seeded(0):
            updates: Sequence[Any] = list(candidate.method.plan(model).updates.values())
    except TargetError:
        if candidate.rank == 1:
            raise
        return None
    return sum(p.numel() for p in {id(p): p for u in updates for p in u.parameters()}.values())


# Of the free memory; the rest is for what is not foreseen
_USED = 0.8


def width_of(asked: int | None, largest: Prepared) -> tuple[int, str]:
    """How many, and why. `asked`: how many were asked for; `largest`: the candidate with the most parameters. Raises AdapterError
    where several were asked for and this model's rows cannot have adapters of their own."""
    first = next(largest.loaded.model.parameters())
    if first.dtype == torch.float16:
        return 1, "in float16 each has a loss scale of its own"
    if asked is not None:
        if asked > 1 and (why := _why_apart(largest)):
            raise AdapterError(f"{asked} candidates cannot share a pass over this model; leave --abreast out. {why}")
        return asked, "as asked for"
    if first.device.type == "cpu":
        return 1, "a CPU is bound by arithmetic"
    if largest.config.gradient_checkpointing:
        return 1, "a GPU's checkpointing sees one adapter at a time"
    if why := _why_apart(largest):
        return 1, why.split(": ")[0]
    found, room = expected(largest), machine.free(first.device)
    if found is None or room is None:
        return 1, "the memory of a pass cannot be told beforehand"
    each = found.memory
    own = each.adapter + each.gradients + each.optimizer + each.activations + each.working
    return max(1, int(room * _USED) // own), "as many as the memory holds"


def _why_apart(prepared: Prepared) -> str | None:
    """Why the rows of a batch cannot have adapters of their own on this model, by a pass of two rows; None where they can."""
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
            return str(error)
        finally:
            attach.detach(model)
    return None
