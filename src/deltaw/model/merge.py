"""Merge adapters into the base's weights, and take them out again bit for bit.

With model/attach.py the only code that edits a model; the arithmetic is that of layers/ops/merging.py. The report says, layer by
layer, what a merge did and whether it is one at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from deltaw.errors import MergeError
from deltaw.layers import ties
from deltaw.layers.kinds import in_few_bits
from deltaw.layers.names import family
from deltaw.layers.ops.checksums import stamp
from deltaw.layers.ops.merging import Change, MergeStats, Product, Sum, Times, Value, merge_, merge_stats, summed
from deltaw.layers.ops.undo import Copy, Correction, Kept, Original, merge_correctably_
from deltaw.layers.tree import dotted, matrix_of, owner_of, place_of
from deltaw.model.attach import detach, problems_of_weights
from deltaw.model.ends import extend
from deltaw.model.record import (
    Adapters,
    Changed,
    in_open_block,
    in_use,
    known,
    lost,
    merged_names,
    put_back,
    readers,
    record_of,
    restore,
    tie_again,
)
from deltaw.model.summary import updates


def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    keep: Literal["copy", "correction"] = "copy",
    allow_unchanged: bool = False,
    untie: bool = False,
) -> MergeReport:
    """Fold ΔW into W0 so that inference costs nothing extra; `unmerge` gives W0 back bit for bit. Computed in fp32, in float64
    where a weight is float64.

    `name` is the adapter (default: the active one); `weights` merges several instead, each ΔW times its weight, in
    the order given. While merged the branch is off. The model's generation_config stops at the adapters' end tokens too.

    `keep` is what is kept until `unmerge`: a copy of each targeted weight, which is the fastest; or a compressed correction
    of what subtracting ΔW misses, some percent of those bytes, for which merge and unmerge take longer. Both give the same
    bits back, and the report says how many bytes they take.

    With `untie` layers that share a weight get one each, where the adapter changes it for some of them, or otherwise for each;
    a model that is saved then has all of them in its checkpoint, and its config says so. `unmerge` ties them again.

    Raises MergeError, with the model as it was, when something is merged already, when a targeted weight is tied to
    another layer that would change too (unless `untie`), or when a targeted weight would come out unchanged (its ΔW is zero
    or was rounded away: the "merged model equals the base" trap) unless `allow_unchanged`.
    """
    record, owner = record_of(model), owner_of(model)
    chosen = _chosen(record, name, weights)
    if busy := in_open_block(record, record.attached):
        raise MergeError(f"{busy}: merge when the block is over.")
    _check_mergeable(model, record, chosen)
    changes = _changes(model, record, chosen)
    _check_writable(owner, changes)
    every = dict(changes)
    tied = _check_possible(owner, changes, untie=untie)
    stats: dict[str, MergeStats] = {}
    originals: dict[str, Original] = {}
    if tied:
        record.untied = _untie(owner)
        changes = every
    try:
        for parameter, change in changes.items():
            W0 = matrix_of(owner, parameter)
            with torch.inference_mode(W0.is_inference()), torch.no_grad():
                originals[parameter] = Copy(W0.clone())  # first: whatever interrupts the merge can be undone
                if keep == "correction" and isinstance(change, Product):
                    stats[_line(parameter)], originals[parameter] = merge_correctably_(W0, change)
                else:
                    stats[_line(parameter)] = merge_(W0, change)
        updated = [_line(n) for n, c in changes.items() if _must_change(c, stats[_line(n)])]
        check_merged(stats, allow_unchanged, updated)
        kept = _kept(owner, originals)
    except BaseException:
        put_back(model, originals)
        tie_again(model)
        raise
    record.merged, record.originals = chosen, kept
    record.eos = _extended(model, chosen)
    record.before_merge, record.route.active = record.route.active, None
    extra = sum(original.bytes for original in originals.values())
    return MergeReport(tuple(chosen), stats, extra + _bytes_of_copies(record))


def _must_change(change: Change, done: MergeStats) -> bool:
    """Whether a weight that comes out as it was shows a merge that failed: not one that got a value, which may be the same, nor
    zeros that were scaled."""
    return not isinstance(change, Value) and not (isinstance(change, Times) and done.w0_norm == 0.0)


def _untie(owner: nn.Module) -> ties.Untied:
    """Give each layer that shares a weight one of its own."""
    return ties.untie(owner, readers(owner).values())


def _bytes_of_copies(record: Adapters) -> int:
    """Of the weights that layers have alone while they are untied."""
    shared = record.untied.shared.values() if record.untied is not None else ()
    return sum(p.numel() * p.element_size() for p in shared)


def _extended(model: nn.Module, weights: Mapping[str, float]) -> tuple[Any, Any] | None:
    """Let the model stop where these adapters were taught to, but for those that are taken away."""
    return extend(model, [adapter for adapter, weight in weights.items() if weight > 0])


def _kept(owner: nn.Module, originals: Mapping[str, Original]) -> dict[str, Kept]:
    """Put the originals with stamps of the merged weights, by which `unmerge` sees whether these were changed."""
    names = {name: tuple(same) for same in readers(owner, now=True).values() for name in same}
    kept = {}
    for name, original in originals.items():
        layer, own_name = place_of(owner, name)
        parameter = layer._parameters[own_name]
        assert parameter is not None
        kept[name] = Kept(original, stamp(parameter), names[name])
    return kept


def preview(model: nn.Module, name: str | None = None) -> MergeReport:
    """What merging adapter `name` (default: the active one) would do to the weights in their dtype, to those that can take it.
    Changes nothing, and raises MergeError only when something is merged already."""
    record, owner = record_of(model), owner_of(model)
    chosen = _chosen(record, name, None)
    changes = {n: c for n, c in _changes(model, record, chosen).items() if _misfit(owner, n, c) is None}
    _tied(owner, changes)  # one line for weights that are one
    return MergeReport(tuple(chosen), {_line(n): merge_stats(matrix_of(owner, n), c) for n, c in changes.items()})


def unmerge(model: nn.Module, name: str | None = None, *, changed: Changed = "refuse") -> None:
    """Give every merged weight its original bits back and make the adapter that was active before active again. With a `name`,
    take that adapter out alone: the weights are then what merging the others would have made of them.

    Merged weights that were changed since (cast, trained, loaded anew, tied to others) are an error that names them, and
    nothing is touched; moving the model to another device changes nothing. `changed` says what else to do with them:
    "restore" puts back the copies that `keep="copy"` made, in the dtype that the weights have now; "keep" leaves these weights
    as they are, as the base's own from then on, and restores the others.

    Raises MergeError when nothing is merged, or not this adapter; for changed weights; with a `name`, where the others cannot
    be merged without it, the model being left as it was.
    """
    record = record_of(model)
    if not record.merged:
        raise MergeError("Nothing is merged.")
    if name is not None and name not in [*record.merged]:
        raise MergeError(f"{name!r} is not merged; {merged_names(record)}.")
    if changed not in get_args(Changed):
        raise MergeError(f"changed is {changed!r}; it can be {', '.join(map(repr, get_args(Changed)))}.")
    others = {} if name is None else {n: w for n, w in record.merged.items() if n != name}
    if others:
        _merge_others(model, record, others, changed)
    else:
        restore(model, changed)


def _merge_others(model: nn.Module, record: Adapters, others: Mapping[str, float], changed: Changed) -> None:
    """Merge these adapters in place of what is merged."""
    keep: Literal["copy", "correction"] = "copy"
    if all(isinstance(kept.original, Correction) for kept in record.originals.values()):
        keep = "correction"
    untied = record.untied is not None
    before = record.merged, dict(record.originals), record.before_merge, record.route.active
    there = record.originals.keys() - lost(model, changed)
    merged = {name: Copy(matrix_of(owner_of(model), name).clone()) for name in there}
    restore(model, changed)
    try:
        merge(model, weights=others, keep=keep, allow_unchanged=True, untie=untied)
    except BaseException:
        record.untied = _untie(owner_of(model)) if untied else None
        put_back(model, merged)
        record.merged, record.originals, record.before_merge, record.route.active = before
        record.eos = _extended(model, record.merged)
        raise


def settle(model: nn.Module) -> None:
    """Make a merge final: the originals are let go, all adapters taken off, and the merged weights stay as the model's."""
    record = record_of(model)
    record.originals, record.merged, record.eos, record.untied = {}, {}, None, None
    detach(model)


def _chosen(record: Adapters, name: str | None, weights: Mapping[str, float] | None) -> dict[str, float]:
    """Adapter → its weight, as `merge` was asked. Raises MergeError."""
    if record.merged:
        raise MergeError(f"{merged_names(record)} merged already: call unmerge(model) first.")
    if weights is None:
        return {in_use(record) if name is None else known(record, name): 1.0}
    if name is not None:
        raise MergeError("Give either a name or weights, not both.")
    if problems := problems_of_weights(weights):
        raise MergeError("; ".join(problems) + ".")
    return {adapter: float(weight) for adapter, weight in weights.items()}


def _line(parameter: str) -> str:
    """The report's name of a parameter: a layer's weight goes by the layer's."""
    return parameter.removesuffix(".weight")


def _changes(model: nn.Module, record: Adapters, weights: Mapping[str, float]) -> dict[str, Change]:
    """Name of a parameter → what these adapters together make of it."""
    owner = owner_of(model)
    terms: dict[str, list[tuple[Change, float]]] = {}
    for adapter, weight in weights.items():
        for layer_name, update in updates(model, known(record, adapter)).items():
            for own_name, change in update.changes(owner.get_submodule(layer_name)).items():
                terms.setdefault(dotted(layer_name, own_name), []).append((change, weight))
    return {name: summed(of_one, _dtype_of(owner, name)) for name, of_one in terms.items()}


def _dtype_of(owner: nn.Module, name: str) -> torch.dtype:
    """The dtype of a parameter; one that the base lacks is as good as fp32."""
    layer, own_name = place_of(owner, name)
    parameter = layer._parameters.get(own_name)
    return torch.float32 if parameter is None else parameter.dtype


def _check_mergeable(model: nn.Module, record: Adapters, names: Iterable[str]) -> None:
    """Raise MergeError where an adapter has updates that no weight can hold."""
    whys = {n: {u.unmergeable for u in updates(model, known(record, n)).values() if u.unmergeable} for n in names}
    problems = [f"{name!r}: {why}" for name, own in whys.items() for why in sorted(own)]
    if problems:
        raise MergeError(
            "Not merged:", problems, "Use such an adapter beside the model, as it is: use(model, name), load and save."
        )


def _check_writable(owner: nn.Module, changes: Iterable[str]) -> None:
    """Raise MergeError where weights are in few bits: rounded to these, W0 + ΔW keeps little of ΔW."""
    forms = {name: form for name in changes if (form := in_few_bits(*place_of(owner, name)))}
    if forms:
        names = [_line(name) for name in forms]
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
        raise MergeError(
            f"This adapter cannot be merged here: the weights of {some} are in few bits "
            f"({'; '.join(sorted({form.name for form in forms.values()}))}), and rounding W0 + ΔW to them would lose much of "
            "ΔW.\nSave the adapter, and merge it into the model as it was before it was quantised: deltaw merge MODEL ADAPTER "
            "--any-base, or merge_files(base, adapter, out, check_base=False). Or go on using it beside this one, as it is."
        )


def _check_possible(owner: nn.Module, changes: dict[str, Change], *, untie: bool) -> bool:
    """Raise MergeError with every parameter that cannot take its change. Of tied ones that get the same value, one is left.
    Returns whether some are to be untied."""
    problems = [why for name, change in changes.items() if (why := _misfit(owner, name, change))]
    tied = _tied(owner, changes)
    problems += [] if untie else tied
    if problems:
        raise MergeError("This adapter cannot be merged as the model stands:", problems)
    return bool(tied)


def _misfit(owner: nn.Module, name: str, change: Change) -> str | None:
    layer, own_name = place_of(owner, name)
    own = layer._parameters.get(own_name)
    if form := in_few_bits(layer, own_name):
        return f"{name} is in few bits ({form.name})"
    if own is None:
        return f"the base has no {name} that the adapter's could be merged into"
    if own.ndim > 2 and not own.is_contiguous():
        return f"{name} is stored in another order (channels last?): call model.to(memory_format=torch.contiguous_format) first"
    terms = [term for term, _ in change.terms] if isinstance(change, Sum) else [change]
    shape = matrix_of(owner, name).shape
    other = next((term.W.shape for term in terms if isinstance(term, Value) and term.W.shape != shape), None)
    if other is not None:
        rows = max(other)
        return (
            f"{name} is {list(own.shape)}, the adapter's vocabulary has {rows} tokens: "
            f"call model.resize_token_embeddings({rows}) before the adapter is loaded"
        )
    return None


def _tied(owner: nn.Module, changes: dict[str, Change]) -> list[str]:
    """What is wrong where a weight is read by other layers too, which would change as well: nothing where the adapter gives all
    of them the same value, of which one is then left in `changes`."""
    problems = []
    for names in readers(owner).values():
        first = next((n for n in names if n in changes), None)
        if first is None:
            continue
        others = [n for n in names if n != first]
        if all(n in changes and _same_value(owner, first, n, changes) for n in others):
            for n in others:
                del changes[n]
        else:
            problems.append(
                f"{first} is tied to {', '.join(others)}, which would change with it: untie them, by "
                "merge(model, untie=True) (command line: --untie)"
            )
    return problems


def _same_value(owner: nn.Module, one: str, other: str, changes: Mapping[str, Change]) -> bool:
    """Whether both, names of one weight, get one and the same value."""
    W, V = matrix_of(owner, one), matrix_of(owner, other)
    return _same_change(changes[one], changes[other], turned=(W.shape, W.stride()) != (V.shape, V.stride()))


def _same_change(one: Change, other: Change, *, turned: bool) -> bool:
    """Whether both give the same value, or add the same ΔW. When `turned`, one is of the transpose: an embedding's beside a
    head's with the same A and B, as PEFT's ensure_weight_tying makes them."""
    if isinstance(one, Sum) and isinstance(other, Sum) and len(one.terms) == len(other.terms):
        pairs = zip(one.terms, other.terms, strict=True)
        return all(w == v and _same_change(a, b, turned=turned) for (a, w), (b, v) in pairs)
    if isinstance(one, Value) and isinstance(other, Value):
        return torch.equal(one.W, other.W.mT if turned else other.W)
    if not (isinstance(one, Product) and isinstance(other, Product)) or one.scale != other.scale:
        return False
    A, B = (other.B.mT, other.A.mT) if turned else (other.A, other.B)
    return torch.equal(one.A, A) and torch.equal(one.B, B)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, per layer."""

    adapters: tuple[str, ...]
    layers: dict[str, MergeStats]
    extra_memory: int = 0
    """Bytes that are kept until `unmerge`."""

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


def check_merged(stats: Mapping[str, MergeStats], allow_unchanged: bool, updated: Iterable[str] | None = None) -> None:
    """Raise MergeError for merged weights that are not finite, and for those of `updated` (default: all) that came out of it
    unchanged."""
    broken = [n for n, s in stats.items() if not math.isfinite(s.largest_change)]
    if broken:
        raise MergeError(
            f"{len(broken)} of {len(stats)} merged weights would not be finite (NaN or infinity): ΔW is not, or the sum "
            "is too large for the weight's dtype:",
            broken,
        )
    same = [n for n in (stats if updated is None else updated) if stats[n].changed == 0.0]
    if same and not allow_unchanged:
        problems = [
            f"{n}: " + ("ΔW is zero (was it trained?)" if not stats[n].dw_norm else "its dtype rounds ΔW away")
            for n in same
        ]
        raise MergeError(
            f"{len(same)} of {len(stats)} targeted weights would come out of the merge unchanged:", problems
        )
