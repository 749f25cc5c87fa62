"""A low-rank adapter out of a model that was fine-tuned whole: the nearest A and B of W − W0 in each targeted layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaw.attached import Plan, apply_plan, check_free, named_parameters, owner_of
from deltaw.ends import own_ends, teach
from deltaw.errors import AdapterError, FileError, listing
from deltaw.layers import kind_of
from deltaw.methods.lora import LoRA
from deltaw.svd import of_matrix
from deltaw.targets import select
from deltaw.updates import LowRank


@dataclass(frozen=True)
class Extracted:
    """What `extract` found."""

    ranks: dict[str, int]
    """Layer name → rank."""
    errors: dict[str, float]
    """Layer name → ‖(W − W0) − BA‖ / ‖W − W0‖."""
    unchanged: tuple[str, ...]
    """Targeted layers in which the two models are equal: they get no update."""
    others: tuple[str, ...]
    """Parameters that differ as well, and that no update holds: norms, biases, embeddings."""


@torch.no_grad()
def extract(
    base: nn.Module,
    tuned: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: str | Sequence[str] | Mapping[str, int] = "all-linear",
    name: str = "default",
) -> Extracted:
    """Attach to `base` the adapter that comes nearest to `tuned`, a model of the same architecture: of each targeted layer's
    W − W0 the first `rank` singular triples, or as many as hold the share `energy` of its squared norm.

    End tokens that the tuned model's generation_config names, and the base's does not, are the adapter's.

    Raises AdapterError for settings out of range or a name that is taken, TargetError, and FileError when the models differ
    in their parameters' names or shapes, or in no targeted layer at all; `base` is then as it was.
    """
    check_free(base, name)
    if (rank is None) == (energy is None):
        raise AdapterError("extract takes either a rank or an energy, the share of ‖W − W0‖² to keep.")
    if (rank is not None and rank < 1) or (energy is not None and not 0.0 < energy <= 1.0):
        raise AdapterError(f"rank must be at least 1 and energy above 0 and at most 1 (they are {rank} and {energy}).")
    before, after = dict(named_parameters(base)), dict(named_parameters(tuned))
    _check_alike(before, after)
    selection = select(owner_of(base), targets, rank or 1)
    if selection.slices:
        raise AdapterError(listing("extract takes whole layers; these targets mean slices of", [*selection.slices]))
    chosen = selection.ranks
    updates: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    unchanged = []
    for layer_name, own_rank in chosen.items():
        layer: Any = owner_of(base).get_submodule(layer_name)
        kind = kind_of(layer)
        assert kind is not None
        dW = kind.W0(owner_of(tuned).get_submodule(layer_name)).double() - kind.W0(layer).double()
        if not dW.any():
            unchanged.append(layer_name)
            continue
        found = of_matrix(dW, rank=None if rank is None else own_rank, energy=energy)
        updates[layer_name], errors[layer_name] = LowRank(kind, found.A, found.B, 1.0), found.error
    if not updates:
        raise FileError("The two models are equal in all targeted layers: there is no update to extract.")
    ranks = {layer: update.rank for layer, update in updates.items()}
    weights = {f"{layer}.weight" for layer in chosen}
    others = tuple(n for n in before if n not in weights and not torch.equal(before[n], after[n].to(before[n])))
    apply_plan(base, Plan(updates), LoRA(rank=max(ranks.values()), targets=ranks), name=name)
    teach(base, name, [end for end in own_ends(tuned) if end not in own_ends(base)])
    return Extracted(ranks, errors, tuple(unchanged), others)


def _check_alike(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
    problems = [f"{n} is in the base only" for n in before.keys() - after.keys()]
    problems += [f"{n} is in the tuned model only" for n in after.keys() - before.keys()]
    problems += [
        f"{n} is {list(before[n].shape)} in the base, {list(after[n].shape)} in the tuned model"
        for n in before.keys() & after.keys()
        if before[n].shape != after[n].shape
    ]
    if problems:
        raise FileError(listing("The two models are not of one architecture:", sorted(problems)))
