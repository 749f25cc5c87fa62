"""The directions of adapters: how far those of two are the same, and how they lie to the weights of their base (section 7 of the
paper). Knows adapters' files and their models."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from deltaw.errors import FileError
from deltaw.layers import tree
from deltaw.layers.names import by_family
from deltaw.layers.ops.svd import amplified, by_chance, right_directions, similarity
from deltaw.methods.targets import role
from deltaw.runs.folder import Finished

# Of a map's rows and columns
_MOST = 32


def shown(one: Finished) -> list[str]:
    """Two layers that stand for all in pictures: in the middle of the model, q and v as in the paper where they are there, else
    of the kinds that changed the most."""
    middles = [layers[len(layers) // 2] for layers in by_family(_of_layers(one)).values()]
    chosen = [layer for layer in middles if role(layer) in ("q", "v")]
    return (chosen or sorted(middles, key=lambda layer: -float(one.triples[layer].S.norm())))[:2]


def alike(one: Finished, other: Finished) -> dict[str, Any]:
    """φ of the two adapters' directions: of ΔW, and of A as the paper has it, for each kind of layer the mean, beside what is to
    be expected of random directions. Raises FileError where they share no layer of one width."""
    shared = in_common(one, other)
    if not shared:
        raise FileError(
            f"{one.path} and {other.path} have no layer in common (stacked experts aside): their directions cannot be compared."
        )
    rows = []
    for name, layers in by_family(shared).items():
        found = [_of_layer(one, other, layer) for layer in layers]
        means = {key: sum(f[key] for f in found) / len(found) for key in found[0]}
        rows.append({"layers": name, "count": len(layers), **means})
    maps = []
    for layer in [n for n in shown(one) if n in shared]:
        phi = similarity(one.triples[layer].Vh, other.triples[layer].Vh)[:_MOST, :_MOST]
        maps.append({"layer": layer, "values": [[round(v, 3) for v in row] for row in phi.tolist()]})
    return {"rank": one.rank, "other_rank": other.rank, "rows": rows, "maps": maps}


def in_common(one: Finished, other: Finished) -> list[str]:
    """Layers whose directions can be compared: of one width."""
    widths = {layer: other.triples[layer].Vh.shape[1] for layer in _of_layers(other)}
    return [layer for layer in _of_layers(one) if widths.get(layer) == one.triples[layer].Vh.shape[1]]


def _of_layer(one: Finished, other: Finished, layer: str) -> dict[str, float]:
    mine, theirs = one.triples[layer].Vh, other.triples[layer].Vh
    of_update = similarity(mine, theirs)
    of_A = similarity(right_directions(one.file.factors[layer][0]), right_directions(other.file.factors[layer][0]))
    chance = by_chance(len(mine), len(theirs), mine.shape[1])
    tables = {"": of_update, "_of_A": of_A, "_by_chance": chance}
    least = min(of_update.shape) - 1
    firsts = {f"first{name}": float(phi[0, 0]) for name, phi in tables.items()}
    return firsts | {f"all{name}": float(phi[least, least]) for name, phi in tables.items()}


def amplifications(model: nn.Module, one: Finished, rank: int) -> list[dict[str, Any]]:
    """Table 7 of the paper for the first `rank` directions: of each kind of layer the one in the middle of the model."""
    owner = tree.owner_of(model)
    found = []
    for layers in by_family(_of_layers(one)).values():
        layer = layers[len(layers) // 2]
        W = _weight(owner, layer)
        own = one.triples[layer]
        if W is None or tuple(W.shape) != (own.U.shape[0], own.Vh.shape[1]):
            continue
        amount = amplified(W, own, rank)
        found.append({"layer": layer, "factor": amount.factor, **dataclasses.asdict(amount)})
    return found


def _of_layers(one: Finished) -> list[str]:
    """Without stacks of experts, of which each has directions of its own."""
    return [layer for layer, own in one.triples.items() if own.S.ndim == 1]


def _weight(owner: nn.Module, layer: str) -> torch.Tensor | None:
    """W of a layer by its name in an adapter's file; None of what is no layer with a weight of its own."""
    try:
        return tree.matrix_of(owner, f"{layer}.weight")
    except (AttributeError, KeyError, AssertionError):
        return None
