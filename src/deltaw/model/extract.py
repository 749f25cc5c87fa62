"""A low-rank adapter out of a model that was fine-tuned whole: the A and B nearest to W − W0 in each targeted layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError, FileError
from deltaw.layers.kinds import PARAMETER, Weight, kind_of
from deltaw.layers.ops.svd import Truncated, of_matrix
from deltaw.layers.tree import dotted, owner_of
from deltaw.methods.lora import LoRA
from deltaw.methods.plan import Plan
from deltaw.methods.targets import Layer, select
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.lowrank import LowRank
from deltaw.methods.updates.weights import Stack, put_on_weight
from deltaw.model.attach import apply_plan
from deltaw.model.ends import own_ends, teach
from deltaw.model.record import check_free, named_parameters
from deltaw.model.summary import adapters


@dataclass(frozen=True)
class Extracted:
    """The adapter that `extract` attached, and what it leaves out. W is the tuned model's weight, W0 the base's."""

    ranks: dict[str, int]
    """Layer name → rank."""
    errors: dict[str, float]
    """Layer name → ‖(W − W0) − BA‖ / ‖W − W0‖."""
    unchanged: tuple[str, ...]
    """Targeted layers without an update, since the two models are equal there."""
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
    """Attach to `base` the adapter that comes nearest to `tuned`, by the first singular triples of W − W0 in each targeted layer.

    End tokens that the tuned model's generation_config names, and the base's does not, become the adapter's.

    Args:
        base: The model to attach to.
        tuned: A model of the same architecture, fine-tuned whole.
        rank: How many singular triples to keep in each layer.
        energy: Instead of a rank, the share of ‖W − W0‖² to keep in each layer, above 0 and at most 1.
        targets: The layers, as for `LoRA`; a mapping gives some of them other ranks.
        name: The adapter's name.

    Returns:
        The rank and the error of each layer, and what differs besides.

    Raises:
        AdapterError: A setting is out of range, the name is taken, or the tuned model goes through an adapter that is not merged.
        TargetError: The targets match nothing, or a layer that cannot take an update.
        FileError: The models differ in their parameters' names or shapes, or in no targeted layer. After any error `base` is as
            it was.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> base, tuned = (AutoModelForCausalLM.from_pretrained("model") for _ in range(2))
    >>> tuned.model.layers[0].mlp.up_proj.weight.data += 0.1  # a change of rank 1
    >>> extracted = deltaw.extract(base, tuned, energy=0.99)
    >>> extracted.ranks, len(extracted.unchanged)
    ({'model.layers.0.mlp.up_proj': 1}, 13)
    """
    check_free(base, name)
    if (rank is None) == (energy is None):
        raise AdapterError("extract takes either a rank or an energy, the share of ‖W − W0‖² to keep.")
    if (rank is not None and rank < 1) or (energy is not None and not 0.0 < energy <= 1.0):
        raise AdapterError(f"rank must be at least 1 and energy above 0 and at most 1 (they are {rank} and {energy}).")
    if (active := adapters(tuned).active) is not None:
        raise AdapterError(
            f"The tuned model goes through adapter {active!r}, which is not in its weights: call merge(tuned) first, or "
            "use(tuned, None) to leave the adapter out."
        )
    before, after = dict(named_parameters(base)), dict(named_parameters(tuned))
    _check_alike(before, after)
    selection = select(owner_of(base), targets, rank or 1)
    if selection.slices:
        raise AdapterError("extract takes whole layers; these targets mean slices of", [*selection.slices])
    updates: dict[str, Update] = {}
    errors: dict[str, float] = {}
    unchanged = []
    for layer_name, layer in selection.layers.items():
        W0, twin = _matrices(layer), _twin(owner_of(tuned), layer_name, layer)
        dW = _matrices(twin).double() - W0.double()
        if not dW.any():
            unchanged.append(layer_name)
            continue
        near = of_matrix(dW, rank=None if rank is None else selection.ranks[layer_name], energy=energy)
        errors[layer_name] = near.error
        _put(updates, layer_name, layer, near)
    if not updates:
        raise FileError("The two models are equal in all targeted layers: there is no update to extract.")
    rank_of = {
        dotted(n, weight): part.rank for n, update in updates.items() for weight, part in update.low_rank().items()
    }
    weight_of = {n: _weight_name(n, layer) for n, layer in selection.layers.items()}
    ranks = {n: rank_of[weight_of[n]] for n in selection.layers if n in errors}
    weights = set(weight_of.values())
    others = tuple(n for n in before if n not in weights and not torch.equal(before[n], after[n].to(before[n])))
    apply_plan(base, Plan(updates), LoRA(rank=max(ranks.values()), targets=ranks), name=name)
    teach(base, name, [end for end in own_ends(tuned) if end not in own_ends(base)])
    return Extracted(ranks, errors, tuple(unchanged), others)


def _matrices(layer: Layer) -> Tensor:
    """Return a layer's weight as [d, k], a stack's as [E, d, k]."""
    if isinstance(layer, Weight):
        return layer.value.mT if layer.transposed else layer.value
    kind = kind_of(layer)
    assert kind is not None
    return kind.W0(layer)


def _twin(tuned: nn.Module, name: str, layer: Layer) -> Layer:
    """Return the layer of this name in the tuned model."""
    if isinstance(layer, Weight):
        return Weight(tuned.get_submodule(name.removesuffix(layer.name).removesuffix(".")), layer.name)
    return tuned.get_submodule(name)


def _weight_name(name: str, layer: Layer) -> str:
    """Return the dotted name of a layer's weight."""
    return name if isinstance(layer, Weight) else f"{name}.weight"


def _put(updates: dict[str, Update], name: str, layer: Layer, near: Truncated) -> None:
    """Add a layer's A and B to the updates; those of a weight without a layer go into its module's update."""
    if isinstance(layer, Weight):
        part = Stack(near.A, near.B, 1.0, transposed=layer.transposed) if near.A.ndim == 3 else None
        module_name = name.removesuffix(layer.name).removesuffix(".")
        put_on_weight(updates, module_name, layer.name, part or LowRank(PARAMETER, near.A, near.B, 1.0))
        return
    kind = kind_of(layer)
    assert kind is not None
    updates[name] = LowRank(kind, near.A, near.B, 1.0)


def _check_alike(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
    """Raise FileError with all parameters that one of the models lacks or has in another shape."""
    problems = [f"{n} is in the base only" for n in before.keys() - after.keys()]
    problems += [f"{n} is in the tuned model only" for n in after.keys() - before.keys()]
    problems += [
        f"{n} is {list(before[n].shape)} in the base, {list(after[n].shape)} in the tuned model"
        for n in before.keys() & after.keys()
        if before[n].shape != after[n].shape
    ]
    if problems:
        raise FileError("The two models are not of one architecture:", sorted(problems))
