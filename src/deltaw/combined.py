"""One adapter out of several attached ones: a weighted sum, exact or cut back to a rank, or TIES or DARE of it. Attaches the
result; changes nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from deltaw.attached import Plan, apply_plan, base_modules, check_free, record_of
from deltaw.errors import AdapterError
from deltaw.layers import LowRank
from deltaw.merged import stacked, terms_of
from deltaw.methods.lora import LoRA
from deltaw.svd import of_factors, of_matrix

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
    probability 1 − `density`, drawn from `seed`, and scales the others up. Both need a rank, since what they make has none.

    Raises AdapterError for unknown names, a name that is taken, and settings out of range.
    """
    record = record_of(model)
    check_free(model, name)
    problems = _problems(weights, how, rank, density)
    if problems:
        raise AdapterError("; ".join(problems) + ".")
    generator = torch.Generator().manual_seed(seed)
    updates: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    terms = terms_of(model, record, {adapter: float(weight) for adapter, weight in weights.items()})
    for layer, summands in terms.items():
        if how == "sum":
            A, B, scale = stacked(summands)
            made, error = (A.detach().float(), B.detach().float() * scale), 0.0
            if rank is not None:
                made, error = _pair(of_factors(*made, rank=rank))
        else:
            dWs = [weight * update.delta() for update, weight in summands]
            made, error = _pair(
                of_matrix(_ties(dWs, density) if how == "ties" else _dare(dWs, density, generator), rank=rank)
            )
        updates[layer], errors[layer] = type(summands[0][0])(*made, 1.0), error
    ranks = {layer: update.rank for layer, update in updates.items()}
    order = [n for n, _ in base_modules(model) if n in updates]
    method = LoRA(rank=max(ranks.values()), targets=ranks)
    apply_plan(model, Plan({n: updates[n] for n in order}), method, name=name, activate=activate)
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


def _pair(made: Any) -> tuple[tuple[Tensor, Tensor], float]:
    return (made.A, made.B), made.error


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
