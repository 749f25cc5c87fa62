"""One adapter out of several attached ones: a weighted sum, exact or cut back to a rank, or TIES or DARE of it. Attaches the
result; changes nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from deltaw.attached import Plan, apply_plan, base_modules, check_free, known, matrix_of, owner_of, record_of, updates
from deltaw.ends import taught, teach
from deltaw.errors import AdapterError, listing
from deltaw.lowrank import Product, Sum, dense, summed
from deltaw.methods.lora import LoRA
from deltaw.svd import Truncated, of_factors, of_matrix
from deltaw.updates import LowRank, Replaced, ReplacedRows, Update, with_room

How = Literal["sum", "ties", "dare"]


@dataclass(frozen=True)
class Combined:
    """What `combine` made."""

    name: str
    ranks: dict[str, int]
    """Layer name → rank."""
    errors: dict[str, float]
    """Layer name → ‖ΔW − BA‖ / ‖ΔW‖ of what the rank left of the combination; 0 for an exact sum."""


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    how: How = "sum",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    activate: bool = False,
) -> Combined:
    """Attach a new adapter `name` out of attached ones, not trainable: by default the sum of their ΔW's times their weights,
    which may be negative (a task is taken away).

    Without a `rank` a sum is exact: A's and B's are laid end to end, and ranks add up. With one it is cut to the nearest ΔW of
    that rank. "ties" (Yadav et al. 2023, arXiv 2306.01708) keeps of each ΔW the `density` largest entries, elects a sign for
    each entry, and averages those that have it; "dare" (Yu et al. 2023, arXiv 2311.03099) drops entries of each ΔW with
    probability 1 − `density`, drawn from `seed`, and scales the others up. Both need a rank, since what they make has none; so
    does a sum of DoRA's. Biases and modules that are trained whole are summed by what they add to the base's.
    The end tokens of all that have a positive weight are the new one's.

    Raises AdapterError for unknown names, a name that is taken, settings out of range, and layers that some adapters train whole
    and others by an update.
    """
    record_of(model)
    check_free(model, name)
    problems = _problems(weights, how, rank, density)
    if problems:
        raise AdapterError("; ".join(problems) + ".")
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Update] = {}
    errors: dict[str, float] = {}
    for layer, terms in _terms(model, weights).items():
        found = _Layer(owner_of(model), layer, terms)
        if problem := found.problem(how, rank):
            problems.append(f"{layer}: {problem}")
            continue
        made[layer], errors[layer] = found.combined(how, rank, density, generator)
    if problems:
        raise AdapterError(listing("These adapters cannot be combined so:", problems))
    ranks = {layer: update.rank for layer, update in made.items() if isinstance(update, LowRank)}
    order = [n for n, _ in base_modules(model) if n in made]
    method = LoRA(rank=max(ranks.values(), default=1), targets=ranks)
    apply_plan(model, Plan({n: made[n] for n in order}), method, name=name, activate=activate)
    teach(model, name, taught(model, [adapter for adapter, weight in weights.items() if weight > 0]))
    return Combined(name, ranks, errors)


def _problems(weights: Mapping[str, float], how: str, rank: int | None, density: float) -> list[str]:
    problems = [] if weights else ["weights is empty: name at least one adapter"]
    if how not in get_args(How):
        problems.append(f"how is {how!r}; it must be one of {', '.join(get_args(How))}")
    if rank is not None and rank < 1:
        problems.append(f"rank is {rank}; it must be at least 1")
    if how != "sum" and rank is None:
        problems.append(f"{how} needs a rank: what it makes of ΔW's has none of its own")
    if not 0.0 < density <= 1.0:
        problems.append(f"density is {density:g}; it must be above 0 and at most 1")
    return problems


_Terms = list[tuple[Update, float]]


def _terms(model: nn.Module, weights: Mapping[str, float]) -> dict[str, _Terms]:
    """Layer name → the updates to combine there, each with its weight."""
    terms: dict[str, _Terms] = {}
    for adapter, weight in weights.items():
        for layer_name, update in updates(model, known(record_of(model), adapter)).items():
            terms.setdefault(layer_name, []).append((update, float(weight)))
    return terms


class _Layer:
    """One layer and its updates."""

    def __init__(self, owner: nn.Module, name: str, terms: _Terms) -> None:
        self.owner, self.name, self.terms = owner, name, terms
        self.layer: Any = owner.get_submodule(name)
        self.updates = [update for update, _ in terms]
        self.alone = len(terms) == 1 and terms[0][1] == 1.0

    def problem(self, how: str, rank: int | None) -> str | None:
        """Why they cannot be combined like this."""
        kinds = {LowRank if isinstance(u, LowRank) else type(u) for u in self.updates}
        if len(kinds) > 1:
            return "some of the adapters train it whole, others by an update; merge(model, weights=…) can add them up"
        if kinds != {LowRank}:
            return None if how == "sum" else f"it is trained whole, which {how} is not defined for"
        if rank is None and not self.alone and any(type(u) is not LowRank for u in self.updates):
            return "the ΔW of DoRA has no rank of its own: give a rank"
        return None

    @torch.no_grad()
    def combined(self, how: How, rank: int | None, density: float, generator: torch.Generator) -> tuple[Update, float]:
        """The update, and what its rank left out."""
        first = self.updates[0]
        if self.alone and rank is None and how == "sum":
            return copy.deepcopy(first), 0.0
        if isinstance(first, ReplacedRows):
            return self._rows(), 0.0
        if not isinstance(first, LowRank):
            return Replaced({own_name: self._value(own_name) for own_name in self._own_names()}), 0.0
        found = self._cut(how, rank, density, generator)
        bias = self._value("bias") if any(u.bias is not None for u in self.updates if isinstance(u, LowRank)) else None
        return LowRank(first.kind, found.A, found.B, 1.0, bias=bias), found.error

    def _cut(self, how: How, rank: int | None, density: float, generator: torch.Generator) -> Truncated:
        """A and B of the combination of their ΔW's."""
        changes = [(update.changes(self.layer)["weight"], weight) for update, weight in self.terms]
        if how == "sum" and all(isinstance(change, Product) for change, _ in changes):
            product = summed(changes)
            assert isinstance(product, Product)
            A, B = product.A.detach().float(), product.B.detach().float() * product.scale
            return Truncated(A, B, 0.0) if rank is None else of_factors(A, B, rank=rank)
        W0 = matrix_of(self.owner, f"{self.name}.weight")
        if how == "sum":
            return of_matrix(dense(Sum(changes), W0), rank=rank)
        dWs = [weight * dense(change, W0) for change, weight in changes]
        return of_matrix(_ties(dWs, density) if how == "ties" else _dare(dWs, density, generator), rank=rank)

    def _own_names(self) -> list[str]:
        return list(dict.fromkeys(n for update in self.updates for n in update._parameters))

    def _value(self, own_name: str) -> Tensor:
        """The base's value and, times their weights, what the updates add to it. A vocabulary is as large as the largest."""
        own = self.layer._parameters.get(own_name)
        values = [(v.detach().float(), w) for u, w in self.terms if (v := getattr(u, own_name, None)) is not None]
        base = torch.zeros_like(values[0][0]) if own is None else own.detach().float()
        longest = max([base, *(value for value, _ in values)], key=len)
        base = torch.cat([base, torch.zeros_like(longest[len(base) :])])
        total = base.clone()
        for value, weight in values:
            total[: len(value)] += weight * (value - base[: len(value)])
        return total

    def _rows(self) -> ReplacedRows:
        every = [u for u in self.updates if isinstance(u, ReplacedRows)]
        indices = torch.cat([u.indices for u in every]).unique()
        base = with_room(self.layer._parameters["weight"].detach().float(), indices)[indices]
        rows = base.clone()
        for update, (_, factor) in zip(every, self.terms, strict=True):
            place = torch.searchsorted(indices, update.indices)
            rows[place] += factor * (update.rows.detach().float() - base[place])
        return ReplacedRows(indices, rows)


def _ties(dWs: list[Tensor], density: float) -> Tensor:
    """Trim, elect a sign, and average what agrees with it."""
    trimmed = torch.stack([_largest(dW, density) for dW in dWs])
    sign = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == sign) & (sign != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _largest(dW: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, the others zero."""
    kept = max(1, round(density * dW.numel()))
    threshold = dW.abs().flatten().kthvalue(dW.numel() - kept + 1).values
    return dW * (dW.abs() >= threshold)


def _dare(dWs: list[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Drop entries and rescale, each ΔW by a mask of its own; and add up."""
    total = torch.zeros_like(dWs[0])
    for dW in dWs:
        mask = torch.empty(dW.shape).bernoulli_(density, generator=generator).to(dW.device)
        total += dW * mask / density
    return total
