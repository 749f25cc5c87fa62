"""Merge adapters into the base's weights, and take them out again bit for bit. With attached.py the only code that edits
a model; the arithmetic is lowrank.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.attached import Adapters, detach, known, owner_of, put_back, record_of, restore, updates
from deltaw.errors import MergeError, listing
from deltaw.layers import LowRank
from deltaw.lowrank import MergeStats, merge_, merge_stats
from deltaw.targets import family


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, per layer."""

    adapters: tuple[str, ...]
    layers: dict[str, MergeStats]

    @property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W0‖ over all merged layers together."""
        total = sum(s.w0_norm**2 for s in self.layers.values())
        return (sum(s.dw_norm**2 for s in self.layers.values()) / total) ** 0.5 if total else 0.0

    @property
    def survived(self) -> float:
        """Share of ΔW that the rounding to the weights' dtype kept, weighted by ‖ΔW‖²."""
        total = sum(s.dw_norm**2 for s in self.layers.values())
        return sum(s.survived * s.dw_norm**2 for s in self.layers.values()) / total if total else 1.0

    @property
    def largest_change(self) -> float:
        """The largest |W'−W0| of any entry."""
        return max((s.largest_change for s in self.layers.values()), default=0.0)

    @property
    def changed(self) -> float:
        """Share of a layer's entries that differ after the merge, on average over layers."""
        return sum(s.changed for s in self.layers.values()) / max(1, len(self.layers))

    def rows(self) -> list[dict[str, Any]]:
        """The figures of each family of layers, then of all together."""
        families: dict[str, dict[str, MergeStats]] = {}
        for name, stats in self.layers.items():
            families.setdefault(family(name), {})[name] = stats
        parts = [(name, MergeReport(self.adapters, layers)) for name, layers in families.items()]
        return [part.row(name) for name, part in (*parts, ("all", self))]

    def row(self, name: str) -> dict[str, Any]:
        """The figures of all its layers together, under `name`."""
        return {
            "layers": name, "count": len(self.layers), "relative": self.relative, "survived": self.survived,
            "changed": self.changed, "largest_change": self.largest_change,
        }  # fmt: skip


def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    allow_unchanged: bool = False,
) -> MergeReport:
    """Fold ΔW into W0 so that inference costs nothing extra; `unmerge` gives W0 back bit for bit.

    `name` is the adapter (default: the active one); `weights` merges several instead, each ΔW times its weight, in
    the order given. A copy of each targeted weight is kept until `unmerge`. While merged the branch is off.

    Raises MergeError, with the model as it was, when something is merged already, when a targeted weight is tied to
    another layer that would change too, or when a targeted weight would come out unchanged (its ΔW is zero or was
    rounded away: the "merged model equals the base" trap) unless `allow_unchanged`.
    """
    record, owner = record_of(model), owner_of(model)
    chosen = _chosen(record, name, weights)
    terms = _terms(model, record, chosen)
    _check_ties(owner, terms)
    stats: dict[str, MergeStats] = {}
    originals: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for layer_name, summands in terms.items():
                layer: Any = owner.get_submodule(layer_name)
                originals[layer_name] = layer.weight.detach().clone()
                A, B, scale = _stacked(summands)
                stats[layer_name] = merge_(summands[0][0].W0(layer).detach(), A, B, scale)
        check_merged(stats, allow_unchanged)
    except BaseException:
        put_back(model, originals)
        raise
    record.merged, record.originals = tuple(chosen), originals
    record.before_merge, record.route.active = record.route.active, None
    return MergeReport(tuple(chosen), stats)


def preview(model: nn.Module, name: str | None = None) -> MergeReport:
    """What merging adapter `name` (default: the active one) would do to the weights in their dtype. Changes nothing, and
    raises MergeError only when something is merged already."""
    record, owner = record_of(model), owner_of(model)
    chosen = _chosen(record, name, None)
    stats = {}
    for layer_name, summands in _terms(model, record, chosen).items():
        W0 = summands[0][0].W0(owner.get_submodule(layer_name)).detach()
        stats[layer_name] = merge_stats(W0, *_stacked(summands))
    return MergeReport(tuple(chosen), stats)


def unmerge(model: nn.Module) -> None:
    """Give every merged weight its original bits back and make the adapter that was active before active again.

    Raises MergeError when nothing is merged.
    """
    if not record_of(model).merged:
        raise MergeError("Nothing is merged.")
    restore(model)


def settle(model: nn.Module) -> None:
    """Make a merge final: the originals are let go, all adapters taken off, and the merged weights stay as the model's."""
    record = record_of(model)
    record.originals, record.merged = {}, ()
    detach(model)


def _chosen(record: Adapters, name: str | None, weights: Mapping[str, float] | None) -> dict[str, float]:
    """Adapter → its weight, as `merge` was asked. Raises MergeError."""
    if record.merged:
        raise MergeError(f"Adapter {record.merged[0]!r} is merged already: call unmerge(model) first.")
    if weights is None:
        name = record.route.active if name is None else name
        if name is None:
            raise MergeError(f"No adapter is active: name the one to merge. Attached: {', '.join(record.attached)}.")
        return {name: 1.0}
    if name is not None:
        raise MergeError("Give either a name or weights, not both.")
    if not weights:
        raise MergeError("weights is empty: name at least one adapter.")
    return {adapter: float(weight) for adapter, weight in weights.items()}


def _terms(model: nn.Module, record: Adapters, weights: Mapping[str, float]) -> dict[str, list[tuple[LowRank, float]]]:
    """Layer name → the updates to sum there, each with its weight."""
    terms: dict[str, list[tuple[LowRank, float]]] = {}
    for adapter, weight in weights.items():
        for layer_name, update in updates(model, known(record, adapter)).items():
            terms.setdefault(layer_name, []).append((update, weight))
    return terms


def _stacked(terms: list[tuple[LowRank, float]]) -> tuple[Tensor, Tensor, float]:
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
    for module_name, module in owner.named_modules():
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


def check_merged(stats: Mapping[str, MergeStats], allow_unchanged: bool) -> None:
    """Raise MergeError for merged weights that are not finite, or came out of it unchanged."""
    broken = [n for n, s in stats.items() if not math.isfinite(s.largest_change)]
    if broken:
        raise MergeError(
            listing(
                f"{len(broken)} of {len(stats)} merged weights would not be finite (NaN or infinity): ΔW is not, or the sum "
                "is too large for the weight's dtype:",
                broken,
            )
        )
    same = [n for n, s in stats.items() if s.changed == 0.0]
    if same and not allow_unchanged:
        problems = [
            f"{n}: " + ("ΔW is zero (was it trained?)" if not stats[n].dw_norm else "its dtype rounds ΔW away")
            for n in same
        ]
        raise MergeError(
            listing(f"{len(same)} of {len(stats)} targeted weights would come out of the merge unchanged:", problems)
        )
