"""One adapter out of several attached ones: a weighted sum, exact or cut to a rank, or TIES or DARE of it.

Attaches the result and changes nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError
from deltaw.layers.ops.merging import Product, dense, wide
from deltaw.layers.ops.svd import Truncated, of_factors, of_matrix
from deltaw.layers.tree import base_modules, dotted, matrix_of, owner_of
from deltaw.methods.lora import LoRA
from deltaw.methods.plan import Method, Plan
from deltaw.methods.updates.base import UNALIKE, Sums, Update
from deltaw.methods.updates.bitfit import AddedBias
from deltaw.methods.updates.lowrank import LowRank
from deltaw.methods.updates.weights import OnWeights
from deltaw.methods.updates.whole import Replaced
from deltaw.model.attach import apply_plan
from deltaw.model.ends import taught, teach
from deltaw.model.record import check_free, known, on_whole_layers, problems_of_weights, record_of
from deltaw.model.summary import updates

How = Literal["sum", "ties", "dare"]


@dataclass(frozen=True)
class Combined:
    """The result of `combine`."""

    name: str
    ranks: dict[str, int]
    """Layer name → rank."""
    errors: dict[str, float]
    """Layer name → ‖ΔW − BA‖ / ‖ΔW‖, the share of the combination that the rank left out; 0 for an exact sum."""


@dataclass(frozen=True)
class _Recipe:
    """The settings by which ΔW's become one."""

    how: How
    rank: int | None
    density: float
    generator: torch.Generator


@on_whole_layers
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
    """Attach a new adapter made of attached ones, by default the sum of their ΔW's times their weights. It is not trainable.

    One adapter of weight 1 is copied as it is. Biases, (IA)³'s vectors and modules that are trained whole are summed by what they
    add to the base's. Each matrix of a stack (a mixture's experts) is combined by itself. The new adapter ends where those with a
    positive weight do.

    Args:
        model: The model with the adapters.
        weights: Adapter → its weight; a negative one takes a task away.
        name: The new adapter's name.
        how: "sum"; "ties" (Yadav et al. 2023, arXiv 2306.01708), which keeps the largest entries of each ΔW, elects a sign for
            each entry and averages the entries that have it; or "dare" (Yu et al. 2023, arXiv 2311.03099), which drops entries
            of each ΔW at random and scales the others up.
        rank: Cut the result to the nearest ΔW of this rank. Without one a sum is exact: A's and B's are concatenated, and ranks
            add up. "ties", "dare" and sums of DoRA's need one, since their result has no rank of its own.
        density: The share of entries that "ties" keeps, and the probability with which "dare" does.
        seed: Decides the entries that "dare" drops.
        activate: Make the new adapter active.

    Returns:
        The rank and the error of each layer.

    Raises:
        AdapterError: A name is unknown or taken, a weight is no finite number or another setting out of range, an adapter's
            updates have no sum (bottleneck adapters, prefixes), or some adapters train a layer whole and others by an update.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4, targets="q"), name="a")
    >>> _ = deltaw.attach(model, deltaw.LoRA(rank=2, targets="q"), name="b")
    >>> deltaw.combine(model, {"a": 0.5, "b": -1.0}, name="both").ranks["model.layers.0.self_attn.q_proj"]
    6
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
    sites = _sites(model, weights)
    problems = [f"{site.name or 'the model'}: {why}" for site in sites if (why := _why_not(site, recipe))]
    if problems:
        raise AdapterError("These adapters cannot be combined so:", problems)
    shared: Sums = {}
    combined: dict[str, Update] = {}
    errors: dict[str, float] = {}
    for site in sites:
        combined[site.name], of_layer = _combined(site, recipe, shared)
        errors |= of_layer
    ranks = _ranks(combined)
    method = _method([record.attached[adapter].method for adapter in weights], combined, ranks)
    order = [n for n, _ in base_modules(model) if n in combined]
    apply_plan(model, Plan({n: combined[n] for n in order}), method, name=name, activate=activate)
    teach(model, name, taught(model, [adapter for adapter, weight in weights.items() if weight > 0]))
    return Combined(name, ranks, errors)


def _problems(weights: Mapping[str, float], how: str, rank: int | None, density: float) -> list[str]:
    """Return what is wrong with the settings."""
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


def _copied(model: nn.Module, source: str, name: str, *, activate: bool) -> Combined:
    """Attach the adapter `source` once more, with its settings; parameters that its layers share are shared in the copy."""
    adapter = record_of(model).attached[known(record_of(model), source)]
    combined = copy.deepcopy(updates(model, source))
    plan = Plan(combined, dict(adapter.left_out))
    apply_plan(model, plan, adapter.method, name=name, activate=activate, metadata=adapter.metadata.copy())
    ranks = _ranks(combined)
    without_rank = {n: 0.0 for n, update in combined.items() if not update.low_rank()}
    return Combined(name, ranks, dict.fromkeys(ranks, 0.0) | without_rank)


def _ranks(combined: Mapping[str, Update]) -> dict[str, int]:
    """Return the rank of each layer that has one; a weight without a layer goes by its own name."""
    ranks: dict[str, int] = {}
    for name, update in combined.items():
        for parameter, part in update.low_rank().items():
            ranks[dotted(name, parameter) if update.of_weights else name] = part.rank
    return ranks


def _method(methods: Sequence[Method], combined: Mapping[str, Update], ranks: Mapping[str, int]) -> Method:
    """Return the settings under which the result is saved."""
    first = methods[0]
    if not isinstance(first, LoRA) and all(method == first for method in methods):
        return first
    settings = [method.of_layers(combined) for method in methods]
    if settings[0] is not None and all(other == settings[0] for other in settings):
        return settings[0]
    return LoRA(rank=max(ranks.values(), default=1), targets=dict(ranks))


# --- one layer ----------------------------------------------------------------------------------------------------


_Terms = list[tuple[Update, float]]
"""Updates and their weights."""


@dataclass(frozen=True)
class _Site:
    """A layer, or a module with weights of its own, and the updates to combine there."""

    owner: nn.Module
    """The model that has it."""
    name: str
    layer: nn.Module
    terms: _Terms

    @property
    def updates(self) -> list[Update]:
        return [update for update, _ in self.terms]

    @property
    def low_rank(self) -> list[str]:
        """The layer's names of parameters that have low-rank updates."""
        return list(dict.fromkeys(parameter for update in self.updates for parameter in update.low_rank()))

    @property
    def values(self) -> list[str]:
        """The layer's names of parameters that have other values."""
        return list(dict.fromkeys(parameter for update in self.updates for parameter in update.values()))

    @property
    def is_layer(self) -> bool:
        """It is a layer, with at most one low-rank update; not a module with weights of its own."""
        return not any(update.of_weights for update in self.updates)


def _sites(model: nn.Module, weights: Mapping[str, float]) -> list[_Site]:
    """Return the layers that these adapters change, each with the updates to combine."""
    owner = owner_of(model)
    terms: dict[str, _Terms] = {}
    for adapter, weight in weights.items():
        for layer_name, update in updates(model, known(record_of(model), adapter)).items():
            terms.setdefault(layer_name, []).append((update, weight))
    return [_Site(owner, name, owner.get_submodule(name), of_layer) for name, of_layer in terms.items()]


def _why_not(site: _Site, recipe: _Recipe) -> str | None:
    """Return why the updates of a layer cannot be combined like this; None if they can."""
    low_rank, values = site.low_rank, site.values
    if whys := {update.unmergeable for update in site.updates if update.unmergeable}:
        return "; ".join(sorted(whys)) + ", and which has no sum"
    first, *others = site.updates
    if why := next(filter(None, (first.why_no_sum(other) for other in others)), None):
        return why
    if set(low_rank) & set(values):
        return UNALIKE
    if low_rank and set(values) - ({"bias"} if site.is_layer else set()):
        return (
            f"some of the adapters have an update of its {', '.join(low_rank)}, others values of its {', '.join(values)}, "
            "and no update holds both; merge(model, weights=…) can add them up"
        )
    if not low_rank and recipe.how != "sum":
        return f"it is {first.done_to_layer}, which {recipe.how} is not defined for"
    inexact = any(part.exact_product is None for u in site.updates for part in u.low_rank().values())
    return "the ΔW of DoRA has no rank of its own: give a rank" if recipe.rank is None and inexact else None


@torch.no_grad()
def _combined(site: _Site, recipe: _Recipe, shared: Sums) -> tuple[Update, dict[str, float]]:
    """Return a layer's combined update, and the error that its rank leaves.

    Errors go by the name of the layer, or of each of its weights that have no layer.
    """
    first = site.updates[0]
    if first.own_sum:
        return first.summed(site.layer, site.terms, shared), {site.name: 0.0}
    values = {parameter: _summed_value(site, parameter, shared) for parameter in site.values}
    if not site.low_rank:
        adds_bias = site.layer._parameters.get("bias") is None and "bias" in values
        return AddedBias(values["bias"]) if adds_bias else Replaced(values), {site.name: 0.0}
    parts: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for parameter in site.low_rank:
        parts[parameter], error = _combined_low_rank(site, parameter, recipe, values.get("bias"))
        errors[site.name if site.is_layer else dotted(site.name, parameter)] = error
    return parts["weight"] if site.is_layer else OnWeights(parts), errors


# --- low-rank updates ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Near:
    """The nearest A and B of one matrix, and its ‖ΔW‖."""

    truncated: Truncated
    norm: float


def _combined_low_rank(site: _Site, parameter: str, recipe: _Recipe, bias: Tensor | None) -> tuple[LowRank, float]:
    """Return the combined low-rank update of one weight, and the error that its rank leaves."""
    terms = [(part, weight) for update, weight in site.terms if (part := update.low_rank().get(parameter)) is not None]
    first = terms[0][0]
    if recipe.how == "sum" and all(part.exact_product is not None for part, _ in terms):
        joined = first.joined(terms, bias)
        if recipe.rank is None:
            return joined, 0.0
        near = of_factors(joined.A, joined.B, rank=recipe.rank)
    elif first.A.ndim == 3:
        near = _stacked(
            [
                _near([weight * _dense(site, part, parameter, e) for part, weight in terms], recipe)
                for e in range(len(first.A))
            ]
        )
    else:
        near = _near([weight * _dense(site, part, parameter, None) for part, weight in terms], recipe).truncated
    return first.remade(near.A, near.B, bias), near.error


def _dense(site: _Site, part: LowRank, parameter: str, e: int | None) -> Tensor:
    """Return an update's ΔW [d, k] in fp32, of a stack that of its `e`th matrix."""
    product = part.exact_product
    if product is None:
        return dense(part.changes(site.layer)[parameter], matrix_of(site.owner, dotted(site.name, parameter)))
    A, B = (product.A, product.B) if e is None else (product.A[e], product.B[e])
    return dense(Product(A, B, product.scale), A.new_empty(()).expand(B.shape[0], A.shape[1]))


def _near(dWs: Sequence[Tensor], recipe: _Recipe) -> _Near:
    """Return the nearest A and B of the combination of these ΔW's, each [d, k]."""
    if recipe.how == "sum":
        dW = torch.stack(list(dWs)).sum(0)
    elif recipe.how == "ties":
        dW = ties_of(dWs, recipe.density)
    else:
        dW = dare_of(dWs, recipe.density, recipe.generator)
    return _Near(of_matrix(dW, rank=recipe.rank), float(dW.norm()))


def _stacked(matrices: Sequence[_Near]) -> Truncated:
    """Return the A's and B's of a stack's matrices as one; the error is that of all of them together."""
    A = torch.stack([near.truncated.A for near in matrices])
    B = torch.stack([near.truncated.B for near in matrices])
    total = sum(near.norm**2 for near in matrices)
    missing = sum((near.truncated.error * near.norm) ** 2 for near in matrices)
    return Truncated(A, B, (missing / total) ** 0.5 if total else 0.0)


def ties_of(dWs: Sequence[Tensor], density: float) -> Tensor:
    """Return the TIES merge of ΔW's: trim each, elect a sign for each entry, and average the entries that have it."""
    trimmed = torch.stack([_largest(dW, density) for dW in dWs])
    sign = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == sign) & (sign != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _largest(dW: Tensor, density: float) -> Tensor:
    """Return ΔW with its entries of largest magnitude, the share `density` of all; the others are zero."""
    kept = max(1, round(density * dW.numel()))
    threshold = dW.abs().flatten().kthvalue(dW.numel() - kept + 1).values
    return dW * (dW.abs() >= threshold)


def dare_of(dWs: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Return the DARE sum of ΔW's: drop entries of each by a mask of its own, scale the others up, and add."""
    total = torch.zeros_like(dWs[0])
    for dW in dWs:
        mask = torch.empty(dW.shape).bernoulli_(density, generator=generator).to(dW.device)
        total += dW * mask / density
    return total


# --- values -----------------------------------------------------------------------------------------------------


def _summed_value(site: _Site, parameter: str, shared: Sums) -> nn.Parameter:
    """Return the base's value plus, times their weights, what the updates add to it; a vocabulary is as large as the largest."""
    terms = [(value, weight) for update, weight in site.terms if (value := update.values().get(parameter)) is not None]
    key = tuple((id(value), weight) for value, weight in terms)
    if key not in shared:
        before = site.layer._parameters.get(parameter)
        base = torch.zeros_like(terms[0][0]) if before is None else before.detach()
        shared[key] = nn.Parameter(_summed(base, [(value.detach(), weight) for value, weight in terms]))
    return shared[key]


def _summed(base: Tensor, terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return base + Σ weight·(value − base), fp32 at least. If values have more rows than the base, its rows there are zero."""
    dtype = wide(base.dtype)
    base = base.to(dtype)
    if most := max((len(value) - len(base) for value, _ in terms if value.ndim), default=0):
        base = torch.cat([base, base.new_zeros(max(0, most), *base.shape[1:])])
    total = base.clone()
    for value, weight in terms:
        rows = slice(len(value)) if value.ndim else ...
        total[rows] += weight * (value.to(dtype) - base[rows])
    return total
