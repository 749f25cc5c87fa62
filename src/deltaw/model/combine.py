"""One adapter out of several attached ones: a weighted sum, exact or cut back to a rank, or TIES or DARE of it. Attaches the
result; changes nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError
from deltaw.layers.ops.merging import Product, dense
from deltaw.layers.ops.svd import Truncated, of_factors, of_matrix
from deltaw.layers.tree import base_modules, dotted, matrix_of, owner_of
from deltaw.methods.lora import LoRA
from deltaw.methods.plan import Plan
from deltaw.methods.updates.base import UNALIKE, Sums, Update
from deltaw.methods.updates.bitfit import AddedBias
from deltaw.methods.updates.lowrank import LowRank
from deltaw.methods.updates.weights import OnWeights
from deltaw.methods.updates.whole import Replaced
from deltaw.model.attach import apply_plan, problems_of_weights
from deltaw.model.ends import taught, teach
from deltaw.model.record import check_free, known, record_of
from deltaw.model.summary import updates

How = Literal["sum", "ties", "dare"]


@dataclass(frozen=True)
class _Recipe:
    """The settings by which ΔW's become one."""

    how: How
    rank: int | None
    density: float
    generator: torch.Generator


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

    Without a `rank` a sum is exact: A's and B's are concatenated, and ranks add up. With one it is cut to the nearest ΔW of
    that rank. "ties" (Yadav et al. 2023, arXiv 2306.01708) keeps of each ΔW the `density` largest entries, elects a sign for
    each entry, and averages those that have it; "dare" (Yu et al. 2023, arXiv 2311.03099) drops entries of each ΔW with
    probability 1 − `density`, drawn from `seed`, and scales the others up. Both need a rank, since what they make has none; so
    does a sum of DoRA's. Each matrix of a stack (a mixture's experts) is cut by itself. Biases, (IA)³'s vectors and modules
    that are trained whole are summed by what they add to the base's. One adapter of weight 1 is copied as it is.
    The end tokens of all that have a positive weight are the new one's.

    Raises AdapterError for unknown names, a name that is taken, weights that are no finite numbers, settings out of range,
    updates that have no sum (bottleneck adapters, prefixes), and layers that some adapters train whole and others by an update.
    """
    record = record_of(model)
    check_free(model, name)
    problems = _problems(weights, how, rank, density)
    if problems:
        raise AdapterError("; ".join(problems) + ".")
    weights = {adapter: float(weight) for adapter, weight in weights.items()}
    if how == "sum" and rank is None and [*weights.values()] == [1.0]:
        return _copied(model, next(iter(weights)), name, activate=activate)
    recipe = _Recipe(how, rank, density, torch.Generator().manual_seed(seed))
    layers = {n: _Layer(owner_of(model), n, terms) for n, terms in _terms(model, weights).items()}
    problems = [f"{n or 'the model'}: {problem}" for n, layer in layers.items() if (problem := layer.problem(recipe))]
    if problems:
        raise AdapterError("These adapters cannot be combined so:", problems)
    shared: Sums = {}
    sums = {n: layer.combined(recipe, shared) for n, layer in layers.items()}
    combined = {n: update for n, (update, _) in sums.items()}
    ranks = _ranks(combined)
    errors = {own: error for _, of_layer in sums.values() for own, error in of_layer.items()}
    method = _method([record.attached[adapter].method for adapter in weights], combined, ranks)
    order = [n for n, _ in base_modules(model) if n in combined]
    apply_plan(model, Plan({n: combined[n] for n in order}), method, name=name, activate=activate)
    teach(model, name, taught(model, [adapter for adapter, weight in weights.items() if weight > 0]))
    return Combined(name, ranks, errors)


def _copied(model: nn.Module, source: str, name: str, *, activate: bool) -> Combined:
    """The adapter `source` once more, with its settings; parameters that its layers share are shared in the copy."""
    adapter, combined = (
        record_of(model).attached[known(record_of(model), source)],
        copy.deepcopy(updates(model, source)),
    )
    plan = Plan(combined, dict(adapter.left_out))
    apply_plan(model, plan, adapter.method, name=name, activate=activate, metadata=dict(adapter.metadata))
    ranks = _ranks(combined)
    whole = {n: 0.0 for n, update in combined.items() if not update.low_rank()}
    return Combined(name, ranks, dict.fromkeys(ranks, 0.0) | whole)


def _ranks(combined: Mapping[str, Update]) -> dict[str, int]:
    """Layer name → rank, of those that have one."""
    parts = {n: update.low_rank() for n, update in combined.items()}
    return {_named(combined[n], n, own): part.rank for n in parts for own, part in parts[n].items()}


def _named(update: Update, layer: str, own: str) -> str:
    """A layer's weight goes by the layer's name, a weight without a layer by its own."""
    return dotted(layer, own) if update.of_weights else layer


def _method(methods: Sequence[Any], combined: Mapping[str, Update], ranks: Mapping[str, int]) -> Any:
    """The settings under which the result is saved."""
    first = methods[0]
    if not isinstance(first, LoRA) and all(method == first for method in methods):
        return first
    settings = [method.of_layers(combined) for method in methods]
    if settings[0] is not None and all(method == settings[0] for method in settings):
        return settings[0]
    return LoRA(rank=max(ranks.values(), default=1), targets=dict(ranks))


def _problems(weights: Mapping[str, float], how: str, rank: int | None, density: float) -> list[str]:
    problems = problems_of_weights(weights)
    if how not in get_args(How):
        problems.append(f"how is {how!r}; it must be one of {', '.join(get_args(How))}")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        problems.append(f"rank is {rank}; it must be a whole number of at least 1")
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
            terms.setdefault(layer_name, []).append((update, weight))
    return terms


class _Layer:
    """One layer and its updates."""

    def __init__(self, owner: nn.Module, name: str, terms: _Terms) -> None:
        self.owner, self.name, self.terms = owner, name, terms
        self.layer: Any = owner.get_submodule(name)
        self.updates = [update for update, _ in terms]
        self.parts = {own: None for update in self.updates for own in update.low_rank()}
        """The layer's own names of parameters that have low-rank updates."""
        self.values = {own: None for update in self.updates for own in update.values()}
        """The layer's own names of parameters that have other values."""
        self.of_layer = not any(update.of_weights for update in self.updates)
        """It is a layer, with at most one low-rank update; not a module with weights of its own."""

    def problem(self, recipe: _Recipe) -> str | None:
        """Why they cannot be combined like this."""
        if whys := {update.unmergeable for update in self.updates if update.unmergeable}:
            return "; ".join(sorted(whys)) + ", and which has no sum"
        first, *others = self.updates
        if why := next(filter(None, (first.why_no_sum(other) for other in others)), None):
            return why
        if self.parts.keys() & self.values.keys():
            return UNALIKE
        if self.parts and self.values.keys() - ({"bias"} if self.of_layer else set()):
            return (
                f"some of the adapters have an update of its {', '.join(self.parts)}, others values of its "
                f"{', '.join(self.values)}, which no update holds both; merge(model, weights=…) can add them up"
            )
        if not self.parts and recipe.how != "sum":
            return f"it is {first.done_to_layer}, which {recipe.how} is not defined for"
        inexact = any(part.exact_product is None for u in self.updates for part in u.low_rank().values())
        return "the ΔW of DoRA has no rank of its own: give a rank" if recipe.rank is None and inexact else None

    @torch.no_grad()
    def combined(self, recipe: _Recipe, shared: Sums) -> tuple[Update, dict[str, float]]:
        """The update; and what its rank left out, by the name of the layer, or of each of its weights that have no layer."""
        if self.updates[0].own_sum:
            return self.updates[0].summed(self.layer, self.terms, shared), {self.name: 0.0}
        values = {own: self._value(own, shared) for own in self.values}
        if not self.parts:
            added = self.layer._parameters.get("bias") is None and "bias" in values
            return AddedBias(values["bias"]) if added else Replaced(values), {self.name: 0.0}
        parts: dict[str, LowRank] = {}
        errors: dict[str, float] = {}
        for own in self.parts:
            parts[own], error = self._part(own, recipe, values.get("bias"))
            errors[self.name if self.of_layer else dotted(self.name, own)] = error
        return parts["weight"] if self.of_layer else OnWeights(parts), errors

    def _part(self, own: str, recipe: _Recipe, bias: Tensor | None) -> tuple[LowRank, float]:
        """The low-rank update of one weight, and what its rank left out."""
        terms = [(part, w) for update, w in self.terms if (part := update.low_rank().get(own)) is not None]
        first = terms[0][0]
        if recipe.how == "sum" and all(part.exact_product is not None for part, _ in terms):
            joined = first.joined(terms, bias)
            if recipe.rank is None:
                return joined, 0.0
            near = of_factors(joined.A, joined.B, rank=recipe.rank)
        elif first.A.ndim == 3:
            near = _stacked([self._near(terms, own, recipe, e) for e in range(len(first.A))])
        else:
            near = self._near(terms, own, recipe, None).truncated
        return first.remade(near.A, near.B, bias), near.error

    def _near(self, terms: Sequence[tuple[LowRank, float]], own: str, recipe: _Recipe, e: int | None) -> _Near:
        """A and B of the combination of these ΔW's, or of the `e`th matrix of each in a stack."""
        dWs = [weight * self._dense(part, own, e) for part, weight in terms]
        if recipe.how == "sum":
            dW = torch.stack(dWs).sum(0)
        elif recipe.how == "ties":
            dW = _ties(dWs, recipe.density)
        else:
            dW = _dare(dWs, recipe.density, recipe.generator)
        return _Near(of_matrix(dW, rank=recipe.rank), float(dW.norm()))

    def _dense(self, part: LowRank, own: str, e: int | None) -> Tensor:
        """ΔW [d, k] in fp32."""
        product = part.exact_product
        if product is None:
            return dense(part.changes(self.layer)[own], matrix_of(self.owner, dotted(self.name, own)))
        A, B = (product.A, product.B) if e is None else (product.A[e], product.B[e])
        return dense(Product(A, B, product.scale), A.new_empty(()).expand(B.shape[0], A.shape[1]))

    def _value(self, own: str, shared: Sums) -> nn.Parameter:
        """The base's value and, times their weights, what the updates add to it. A vocabulary is as large as the largest."""
        terms = [(value, w) for update, w in self.terms if (value := update.values().get(own)) is not None]
        key = tuple((id(value), w) for value, w in terms)
        if key not in shared:
            before = self.layer._parameters.get(own)
            base = torch.zeros_like(terms[0][0]) if before is None else before.detach()
            shared[key] = nn.Parameter(_summed(base, [(value.detach(), w) for value, w in terms]))
        return shared[key]


@dataclass(frozen=True)
class _Near:
    """The nearest A and B of one matrix, and ‖ΔW‖."""

    truncated: Truncated
    norm: float


def _stacked(each: Sequence[_Near]) -> Truncated:
    """The A's and B's of a stack's matrices as one; the error is of all of them together."""
    A, B = (torch.stack([getattr(near.truncated, letter) for near in each]) for letter in "AB")
    total = sum(near.norm**2 for near in each)
    missing = sum((near.truncated.error * near.norm) ** 2 for near in each)
    return Truncated(A, B, (missing / total) ** 0.5 if total else 0.0)


def _summed(base: Tensor, terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    """base + Σ weight·(value − base), fp32 at least. Where values have more rows than the base, its are zero."""
    wide = torch.promote_types(base.dtype, torch.float32)
    base = base.to(wide)
    if most := max((len(value) - len(base) for value, _ in terms if value.ndim), default=0):
        base = torch.cat([base, base.new_zeros(max(0, most), *base.shape[1:])])
    total = base.clone()
    for value, weight in terms:
        rows = slice(len(value)) if value.ndim else ...
        total[rows] += weight * (value.to(wide) - base[rows])
    return total


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
