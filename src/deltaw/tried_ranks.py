"""Which candidates a sweep has: ranks and targets, or targets with the ranks that a budget of parameters allows. Knows settings
and shapes; trains nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.config import SweepConfig
from deltaw.errors import ConfigError, listing
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA

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


def candidates(options: SweepConfig, model: Any) -> list[Candidate]:
    """In the order in which they are given. `model`: any with the base's shapes. Raises ConfigError with everything wrong, and
    TargetError for targets that there are not."""
    problems: list[str] = []
    ranks = numbers(options.ranks, int, "ranks", problems)
    learning_rates(options, 1.0, problems)
    count = None if options.budget is None else _count(options.budget, problems)
    if problems:
        raise ConfigError(listing("This sweep cannot be made:", problems))
    targets = choices(options)
    if count is not None:
        found = [_made(options, each, _rank_for(count, options, each, model), ranks[0]) for each in targets]
    else:
        found = [_made(options, each, rank, ranks[0]) for each in targets for rank in ranks]
    for candidate in found:
        candidate.method.plan(model)  # what does not fit is said before anything is trained
    return found


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


def _rank_for(count: int, options: SweepConfig, targets: str, model: Any) -> int:
    """The rank whose parameters are nearest to `count`, at least 1."""
    one, two = (_parameters(_made(options, targets, rank, 1), model) for rank in (1, 2))
    return max(1, round((count - one) / (two - one)) + 1)


def _parameters(candidate: Candidate, model: Any) -> int:
    updates: Sequence[Any] = list(candidate.method.plan(model).updates.values())
    return sum(p.numel() for p in {id(p): p for u in updates for p in u.parameters()}.values())
