"""Merge adapters into the base's weights, and take them out again bit for bit. With attached.py the only code that edits
a model; the arithmetic is lowrank.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.attached import (
    Adapters,
    base_modules,
    detach,
    in_open_block,
    in_use,
    known,
    merged_names,
    owner_of,
    put_back,
    record_of,
    restore,
    updates,
)
from deltaw.errors import MergeError, listing
from deltaw.layers import LowRank
from deltaw.lowrank import MergeStats, merge_, merge_stats
from deltaw.merge_report import MergeReport, check_merged
from deltaw.originals import Copy, Correction, Original, merge_correctably_


def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    keep: Literal["copy", "correction"] = "copy",
    allow_unchanged: bool = False,
) -> MergeReport:
    """Fold ΔW into W0 so that inference costs nothing extra; `unmerge` gives W0 back bit for bit.

    `name` is the adapter (default: the active one); `weights` merges several instead, each ΔW times its weight, in
    the order given. While merged the branch is off.

    `keep` is what is kept until `unmerge`: a copy of each targeted weight, which is the fastest; or a compressed correction
    of what subtracting ΔW misses, some percent of those bytes, for which merge and unmerge take longer. Both give the same
    bits back, and the report says how many bytes they take.

    Raises MergeError, with the model as it was, when something is merged already, when a targeted weight is tied to
    another layer that would change too, or when a targeted weight would come out unchanged (its ΔW is zero or was
    rounded away: the "merged model equals the base" trap) unless `allow_unchanged`.
    """
    record, owner = record_of(model), owner_of(model)
    chosen = _chosen(record, name, weights)
    if busy := in_open_block(record, record.attached):
        raise MergeError(f"{busy}: merge when the block is over.")
    terms = terms_of(model, record, chosen)
    _check_ties(owner, terms)
    stats: dict[str, MergeStats] = {}
    originals: dict[str, Original] = {}
    try:
        with torch.no_grad():
            for layer_name, summands in terms.items():
                W0 = summands[0][0].W0(owner.get_submodule(layer_name)).detach()
                originals[layer_name] = Copy(W0.clone())  # first: whatever interrupts the merge can be undone
                if keep == "correction":
                    stats[layer_name], originals[layer_name] = merge_correctably_(W0, *stacked(summands))
                else:
                    stats[layer_name] = merge_(W0, *stacked(summands))
        check_merged(stats, allow_unchanged)
    except BaseException:
        put_back(model, originals)
        raise
    record.merged, record.originals = chosen, originals
    record.before_merge, record.route.active = record.route.active, None
    return MergeReport(tuple(chosen), stats, sum(original.bytes for original in originals.values()))


def preview(model: nn.Module, name: str | None = None) -> MergeReport:
    """What merging adapter `name` (default: the active one) would do to the weights in their dtype. Changes nothing, and
    raises MergeError only when something is merged already."""
    record, owner = record_of(model), owner_of(model)
    chosen = _chosen(record, name, None)
    stats = {}
    for layer_name, summands in terms_of(model, record, chosen).items():
        W0 = summands[0][0].W0(owner.get_submodule(layer_name)).detach()
        stats[layer_name] = merge_stats(W0, *stacked(summands))
    return MergeReport(tuple(chosen), stats)


def unmerge(model: nn.Module, name: str | None = None) -> None:
    """Give every merged weight its original bits back and make the adapter that was active before active again. With a `name`,
    take that adapter out alone: the weights are then what merging the others would have made of them.

    Raises MergeError when nothing is merged, or not this adapter.
    """
    record = record_of(model)
    if not record.merged:
        raise MergeError("Nothing is merged.")
    if name is not None and name not in record.merged:
        raise MergeError(f"{name!r} is not merged; {merged_names(record)}.")
    others = {} if name is None else {n: w for n, w in record.merged.items() if n != name}
    keep: Literal["copy", "correction"] = "copy"
    if all(isinstance(original, Correction) for original in record.originals.values()):
        keep = "correction"
    restore(model)
    if others:
        merge(model, weights=others, keep=keep, allow_unchanged=True)


def settle(model: nn.Module) -> None:
    """Make a merge final: the originals are let go, all adapters taken off, and the merged weights stay as the model's."""
    record = record_of(model)
    record.originals, record.merged = {}, {}
    detach(model)


def _chosen(record: Adapters, name: str | None, weights: Mapping[str, float] | None) -> dict[str, float]:
    """Adapter → its weight, as `merge` was asked. Raises MergeError."""
    if record.merged:
        raise MergeError(f"{merged_names(record)} merged already: call unmerge(model) first.")
    if weights is None:
        return {in_use(record) if name is None else name: 1.0}
    if name is not None:
        raise MergeError("Give either a name or weights, not both.")
    if not weights:
        raise MergeError("weights is empty: name at least one adapter.")
    return {adapter: float(weight) for adapter, weight in weights.items()}


def terms_of(
    model: nn.Module, record: Adapters, weights: Mapping[str, float]
) -> dict[str, list[tuple[LowRank, float]]]:
    """Layer name → the updates to sum there, each with its weight."""
    terms: dict[str, list[tuple[LowRank, float]]] = {}
    for adapter, weight in weights.items():
        for layer_name, update in updates(model, known(record, adapter)).items():
            terms.setdefault(layer_name, []).append((update, weight))
    return terms


def stacked(terms: list[tuple[LowRank, float]]) -> tuple[Tensor, Tensor, float]:
    """One (A, B, scale) whose ΔW is the weighted sum: ranks add up. A single one at weight 1 stays as it is."""
    if len(terms) == 1:
        update, weight = terms[0]
        return update.A, update.B, update.scale * weight
    A = torch.cat([u.A.detach().float() for u, _ in terms])
    B = torch.cat([u.B.detach().float() * (u.scale * w) for u, w in terms], dim=1)
    return A, B, 1.0


def _check_ties(owner: nn.Module, terms: Mapping[str, Any]) -> None:
    """A weight that another layer reads too would change that layer as well."""
    readers: dict[Tensor, list[str]] = {}
    for module_name, module in base_modules(owner):
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                readers.setdefault(parameter, []).append(f"{module_name}.{parameter_name}")
    problems = []
    for layer_name in terms:
        layer: Any = owner.get_submodule(layer_name)
        others = [r for r in readers[layer.weight] if r != f"{layer_name}.weight"]
        if others:
            problems.append(f"{layer_name}.weight is tied to {', '.join(others)}, which would change with it")
    if problems:
        raise MergeError(
            listing("This adapter cannot be merged as the model stands:", problems) + "\nUntie the weights first."
        )
