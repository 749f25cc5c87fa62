"""Merge adapters into the base's weights, and take them out again bit for bit.

With model/attach.py the only code that edits a model. layers/ops/merging.py has the arithmetic, model/merging/kept.py the way
back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from deltaw.errors import MergeError
from deltaw.layers import ties
from deltaw.layers.ops.merging import Change, MergeStats, Product, Times, Value, merge_, merge_stats, summed
from deltaw.layers.ops.undo import Copy, Correction, Original, merge_correctably_
from deltaw.layers.processes.shards import is_dealt
from deltaw.layers.tree import dotted, matrix_of, owner_of, place_of
from deltaw.model.attach import detach
from deltaw.model.ends import extend
from deltaw.model.merging.checks import (
    check_mergeable,
    check_possible,
    check_writable,
    leave_one_of_tied,
    line,
    misfit,
)
from deltaw.model.merging.kept import Changed, lost, put_back, restore, stamped, stop_as_before, tie_again
from deltaw.model.merging.report import MergeReport, check_merged
from deltaw.model.record import (
    Adapters,
    EndTokens,
    in_open_block,
    in_use,
    known,
    merged_names,
    on_whole_layers,
    problems_of_weights,
    readers,
    record_of,
)
from deltaw.model.summary import updates

if TYPE_CHECKING:
    from transformers import GenerationConfig

Keep = Literal["copy", "correction"]


@on_whole_layers
def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    keep: Keep = "copy",
    allow_unchanged: bool = False,
    untie: bool = False,
) -> MergeReport:
    """Add ΔW to W0, so that inference costs nothing extra; `unmerge` gives W0 back bit for bit.

    The sum is computed in fp32, or in float64 for a float64 weight, and rounded once to the weight's dtype. While merged, no
    adapter is active. The model's generation_config then stops at the adapters' end tokens too.

    Args:
        model: The model with the adapters.
        name: The adapter; the active one by default.
        weights: Several adapters instead of one, each ΔW times its weight, added in this order.
        keep: What is kept until `unmerge`. "copy" keeps each targeted weight, which is fastest. "correction" keeps a compressed
            correction of what subtracting ΔW misses: some percent of those bytes, for a slower merge and unmerge.
        allow_unchanged: Accept targeted weights that come out unchanged.
        untie: Give layers that share a weight one each if the adapter changes it for some of them, or for each in another way.
            A saved model then has all of them in its checkpoint, and its config says so. `unmerge` ties them again.

    Returns:
        The figures of each merged layer, and how many bytes are kept.

    Raises:
        MergeError: Something is merged already, a targeted weight is quantised or tied to another layer that would change with
            it, or a weight would come out not finite, or unchanged since its ΔW is zero or rounded away. The model is left as
            it was.
        AdapterError: There is no such adapter, or none is active.

    >>> import deltaw, torch
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4))
    >>> drawn = [torch.nn.init.normal_(parameter) for parameter in deltaw.parameters(model)]
    >>> report = deltaw.merge(model)
    >>> len(report.layers), deltaw.adapters(model).active
    (14, None)
    """
    record, owner = record_of(model), owner_of(model)
    chosen = _chosen(record, name, weights)
    if busy := in_open_block(record, record.attached):
        raise MergeError(f"{busy}: merge when the block is over.")
    check_mergeable(model, record, chosen)
    if untie and is_dealt(model):
        raise MergeError(
            "Layers cannot be untied while the model's weights are dealt out over processes (fully_shard). Merge in one process: "
            "save the adapter, then deltaw merge --untie, or merge(model, untie=True) on a model that was loaded whole."
        )
    changes = _changes(model, record, chosen)
    check_writable(owner, changes)
    of_all_names = dict(changes)
    if check_possible(owner, changes, untie=untie):
        record.untied = _untie(owner)
        changes = of_all_names
    originals: dict[str, Original] = {}
    active = record.route.active
    try:
        stats = {
            line(name): _merged(matrix_of(owner, name), change, name, originals, keep)
            for name, change in changes.items()
        }
        updated = [line(n) for n, c in changes.items() if _must_change(c, stats[line(n)])]
        check_merged(stats, allow_unchanged, updated)
        kept = stamped(owner, originals)
        extra = sum(original.bytes for original in originals.values())
        report = MergeReport(tuple(chosen), stats, extra + _bytes_of_untied(record))
        record.eos = _extended(model, chosen)
        record.before_merge, record.route.active = active, None
        record.merged, record.originals = chosen, kept
    except BaseException:  # also an interrupt from the keyboard: the model is left as it was
        record.merged, record.originals, record.before_merge, record.route.active = {}, {}, None, active
        put_back(model, originals)
        tie_again(model)
        stop_as_before(record)
        raise
    return report


def _merged(W0: Tensor, change: Change, name: str, originals: dict[str, Original], keep: Keep) -> MergeStats:
    """Merge one weight, and put the way back of it under its name, first of all: whatever interrupts the merge can be undone."""
    with torch.inference_mode(W0.is_inference()), torch.no_grad():
        copy = originals[name] = Copy(W0.clone())
        if keep == "copy" or not isinstance(change, Product):
            return merge_(W0, change)
        stats, correction = merge_correctably_(W0, change)
        if correction.bytes < copy.bytes:  # ΔW may be so large that it takes more
            originals[name] = correction
        return stats


def _must_change(change: Change, stats: MergeStats) -> bool:
    """Return whether a weight that comes out unchanged shows a merge that failed.

    A trained value may equal the base's, and zeros that are scaled stay zeros.
    """
    return not isinstance(change, Value) and not (isinstance(change, Times) and stats.w0_norm == 0.0)


def _untie(owner: nn.Module) -> ties.Untied:
    """Give each layer that shares a weight one of its own."""
    return ties.untie(owner, readers(owner).values())


def _bytes_of_untied(record: Adapters) -> int:
    """Return the bytes of the weights that the model has only while layers are untied."""
    shared = record.untied.shared.values() if record.untied is not None else ()
    return sum(p.numel() * p.element_size() for p in shared)


def _extended(model: nn.Module, weights: Mapping[str, float]) -> tuple[GenerationConfig, EndTokens] | None:
    """Let the model stop at the end tokens of these adapters, except those that are subtracted."""
    return extend(model, [adapter for adapter, weight in weights.items() if weight > 0])


@on_whole_layers
def preview(model: nn.Module, name: str | None = None) -> MergeReport:
    """Return what merging adapter `name` (default: the active one) would do to the weights that can take it.

    The model is not changed. Raises MergeError if something is merged already, and AdapterError if there is no such adapter.
    """
    record, owner = record_of(model), owner_of(model)
    chosen = _chosen(record, name, None)
    changes = {n: c for n, c in _changes(model, record, chosen).items() if misfit(owner, n, c) is None}
    leave_one_of_tied(owner, changes)
    return MergeReport(tuple(chosen), {line(n): merge_stats(matrix_of(owner, n), c) for n, c in changes.items()})


@on_whole_layers
def unmerge(model: nn.Module, name: str | None = None, *, changed: Changed = "refuse") -> None:
    """Give all merged weights their original bits, and make the adapter active that was so before the merge.

    Merged weights that were changed since (cast, trained, loaded anew, tied to others) are an error that names them, and
    nothing is touched. Moving the model to another device is no change.

    Args:
        model: The model that something is merged into.
        name: Take this adapter out alone; the weights are then what merging the others would have made of them.
        changed: The treatment of weights that were changed since. "refuse" raises MergeError. "restore" puts the copies of
            `keep="copy"` back, in the dtype that the weights have now. "keep" leaves these weights as they are, from now on as
            the base's own, and restores the others.

    Raises:
        MergeError: Nothing is merged, or not this adapter; weights were changed; or, with a `name`, the others cannot be merged
            without it. The model is left as it was.

    >>> import deltaw, torch
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4))
    >>> W0 = model.model.layers[0].mlp.up_proj.weight.clone()
    >>> drawn = [torch.nn.init.normal_(parameter) for parameter in deltaw.parameters(model)]
    >>> report = deltaw.merge(model)
    >>> deltaw.unmerge(model)
    >>> torch.equal(model.model.layers[0].mlp.up_proj.weight, W0)
    True
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
    keep: Keep = "copy"
    if any(isinstance(kept.original, Correction) for kept in record.originals.values()):
        keep = "correction"
    untied = record.untied is not None
    before = record.merged, dict(record.originals), record.before_merge, record.route.active
    unchanged = record.originals.keys() - lost(model, changed)
    merged = {name: Copy(matrix_of(owner_of(model), name).clone()) for name in unchanged}
    restore(model, changed)
    try:
        merge(model, weights=others, keep=keep, allow_unchanged=True, untie=untied)
    except BaseException:  # also an interrupt from the keyboard: what was merged is merged again
        record.untied = _untie(owner_of(model)) if untied else None
        put_back(model, merged)
        record.merged, record.originals, record.before_merge, record.route.active = before
        record.eos = _extended(model, record.merged)
        raise


def settle(model: nn.Module) -> None:
    """Make a merge final: drop the originals, take all adapters off, and leave the merged weights as the model's own."""
    record = record_of(model)
    record.originals, record.merged, record.eos, record.untied = {}, {}, None, None
    detach(model)


def _chosen(record: Adapters, name: str | None, weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return the adapters that `merge` was asked for, and their weights. Raises MergeError."""
    if record.merged:
        raise MergeError(f"{merged_names(record)} merged already: call unmerge(model) first.")
    if weights is None:
        return {in_use(record) if name is None else known(record, name): 1.0}
    if name is not None:
        raise MergeError("Give either a name or weights, not both.")
    if problems := problems_of_weights(weights):
        raise MergeError("; ".join(problems) + ".")
    return {adapter: float(weight) for adapter, weight in weights.items()}


def _changes(model: nn.Module, record: Adapters, weights: Mapping[str, float]) -> dict[str, Change]:
    """Return what these adapters together make of each parameter, by its name."""
    owner = owner_of(model)
    terms: dict[str, list[tuple[Change, float]]] = {}
    for adapter, weight in weights.items():
        for layer_name, update in updates(model, known(record, adapter)).items():
            for own_name, change in update.changes(owner.get_submodule(layer_name)).items():
                terms.setdefault(dotted(layer_name, own_name), []).append((change, weight))
    return {name: summed(of_one, _dtype_of(owner, name)) for name, of_one in terms.items()}


def _dtype_of(owner: nn.Module, name: str) -> torch.dtype:
    """Return the dtype of a parameter; fp32 for one that the base lacks."""
    layer, own_name = place_of(owner, name)
    parameter = layer._parameters.get(own_name)
    return torch.float32 if parameter is None else parameter.dtype
