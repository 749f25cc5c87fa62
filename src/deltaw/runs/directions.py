"""The directions of adapters: how far those of two are the same, and how they lie to the weights of their base (section 7 of the
paper, arXiv 2106.09685). Knows adapters' files and their models."""

from __future__ import annotations

import torch
from torch import nn

from deltaw.errors import FileError
from deltaw.layers import tree
from deltaw.layers.names import by_family
from deltaw.layers.ops.svd import amplified, by_chance, right_directions, similarity
from deltaw.methods.targets import role
from deltaw.runs.folder import Finished
from deltaw.runs.results.directions import Alike, AlikeMap, AlikeRow, Amplification

# Rows and columns of a map
_MOST = 32


def layers_to_show(one: Finished) -> list[str]:
    """Return two layers that stand for all in pictures, from the middle of the model: q and v as in the paper where these are
    adapted, else the kinds that changed the most."""
    middles = [layers[len(layers) // 2] for layers in by_family(_single_layers(one)).values()]
    chosen = [layer for layer in middles if role(layer) in ("q", "v")]
    return (chosen or sorted(middles, key=lambda layer: -float(one.triples[layer].S.norm())))[:2]


def alike(one: Finished, other: Finished, name: str = "", *, targets: str | None = None) -> Alike:
    """Return φ of the directions of two adapters, of ΔW and, as the paper has it, of A.

    name: the other adapter, for people to read. targets: in a sweep, the choice of targets that both are of. φ is a mean over the
    layers of each kind, beside what is to be expected of random directions. Raises FileError where no layer is in both with the
    same width.
    """
    shared = in_common(one, other)
    if not shared:
        raise FileError(
            f"{one.path} and {other.path} have no layer in common (stacked experts aside): their directions cannot be compared."
        )
    rows = [_row(kind, [_figures(one, other, layer) for layer in layers]) for kind, layers in by_family(shared).items()]
    maps = []
    for layer in [layer for layer in layers_to_show(one) if layer in shared]:
        phi = similarity(one.triples[layer].Vh, other.triples[layer].Vh)[:_MOST, :_MOST]
        maps.append(AlikeMap(layer, [[round(v, 3) for v in row] for row in phi.tolist()]))
    return Alike(one.rank, other.rank, rows, maps, name, targets)


def in_common(one: Finished, other: Finished) -> list[str]:
    """Return the layers of both adapters whose directions can be compared: those of the same width."""
    widths = {layer: other.triples[layer].Vh.shape[1] for layer in _single_layers(other)}
    return [layer for layer in _single_layers(one) if widths.get(layer) == one.triples[layer].Vh.shape[1]]


def _row(kind: str, layers: list[dict[str, float]]) -> AlikeRow:
    """Return the mean figures over the layers of one kind."""
    means = {name: sum(figures[name] for figures in layers) / len(layers) for name in layers[0]}
    return AlikeRow(layers=kind, count=len(layers), **means)


def _figures(one: Finished, other: Finished, layer: str) -> dict[str, float]:
    """Return φ of one layer under the names that `AlikeRow` has for it."""
    mine, theirs = one.triples[layer].Vh, other.triples[layer].Vh
    of_update = similarity(mine, theirs)
    of_A = similarity(right_directions(one.file.factors[layer][0]), right_directions(other.file.factors[layer][0]))
    chance = by_chance(len(mine), len(theirs), mine.shape[1])
    tables = {"": of_update, "_of_A": of_A, "_by_chance": chance}
    least = min(of_update.shape) - 1
    firsts = {f"first{name}": float(phi[0, 0]) for name, phi in tables.items()}
    return firsts | {f"all{name}": float(phi[least, least]) for name, phi in tables.items()}


def amplifications(model: nn.Module, one: Finished, rank: int) -> list[Amplification]:
    """Return Table 7 of the paper for the first `rank` directions: of each kind of layer the one in the middle of the model."""
    owner = tree.owner_of(model)
    rows = []
    for layers in by_family(_single_layers(one)).values():
        layer = layers[len(layers) // 2]
        W, update = _weight(owner, layer), one.triples[layer]
        if W is not None and tuple(W.shape) == (update.U.shape[0], update.Vh.shape[1]):
            rows.append(Amplification(layer, amplified(W, update, rank)))
    return rows


def _single_layers(one: Finished) -> list[str]:
    """Return the layers without stacks of experts, in which each expert has directions of its own."""
    return [layer for layer, triples in one.triples.items() if triples.S.ndim == 1]


def _weight(owner: nn.Module, layer: str) -> torch.Tensor | None:
    """Return W of a layer by its name in an adapter's file; None where there is no such layer, or none with a weight."""
    try:
        return tree.matrix_of(owner, f"{layer}.weight")
    except (AttributeError, KeyError, AssertionError):
        return None
