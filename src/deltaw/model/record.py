"""The record that a model with adapters carries at its root.

It holds the route that all adapted layers share, what each adapter put where, what was trainable before, and while an adapter is
merged the original weights. A merged weight is what the merge made of it, or somebody changed it since: this is checked before
anything is given back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaw.errors import AdapterError, MergeError, listing, nearest
from deltaw.layers.kinds import as_stored, in_few_bits
from deltaw.layers.ops.checksums import difference
from deltaw.layers.ops.residency import Residency
from deltaw.layers.ops.rows import Rows
from deltaw.layers.ops.undo import Copy, Kept, Original
from deltaw.layers.routing import Route
from deltaw.layers.ties import Untied, tie
from deltaw.layers.tree import RECORD, base_modules, dotted, matrix_of, owner_of, place_of


@dataclass
class Attached:
    """One adapter on a model."""

    method: Any
    layers: tuple[str, ...]
    left_out: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Adapters:
    """All that deltaw keeps about a model. It is copied with the model by `copy.deepcopy`."""

    route: Route = field(default_factory=Route)
    attached: dict[str, Attached] = field(default_factory=dict)
    was_trainable: dict[str, bool] = field(default_factory=dict)
    merged: dict[str, float] = field(default_factory=dict)
    """The adapters that are merged into the base, and their weights."""
    originals: dict[str, Kept] = field(default_factory=dict)
    """While merged: name of a parameter → what gives it back."""
    eos: tuple[Any, Any] | None = None
    """While merged, where that gave the model other end tokens: its generation_config, and the eos_token_id that it had."""
    untied: Untied | None = None
    """While merged: what gives the base its ties back, where the merge has untied it."""
    before_merge: str | None = None
    residency: Residency = field(default_factory=Residency)
    hooks: list[RemovableHandle] = field(default_factory=list)
    """They say when a pass begins and ends."""
    rows_mixed: list[str] | None = None
    """Layers in which the rows of a batch cannot be told apart, once somebody asked; None: not known."""
    rows_reached: set[str] = field(default_factory=set)
    """Layers that were reached when it was asked."""
    rows_asked: set[Any] = field(default_factory=set)
    """Forms of the batches with which it was asked (layers/ops/row_forms.py)."""


# --- merged weights ---------------------------------------------------------------------------------------------


Changed = Literal["refuse", "restore", "keep"]
"""The treatment of merged weights that were changed since: see `unmerge`."""


def lost(model: nn.Module, changed: Changed) -> set[str]:
    """Names of the merged weights that cannot be given back, since they are not what the merge made of them. Raises MergeError
    for these unless `changed` is to "keep" them."""
    record, owner = record_of(model), owner_of(model)
    problems = {name: why for name, kept in record.originals.items() if (why := _since_merge(owner, name, kept))}
    if changed == "restore":
        problems = {n: why for n, why in problems.items() if not _can_be_copied(owner, record.originals[n])}
    if problems and changed != "keep":
        raise MergeError(_why_not_unmerged(owner, problems, record.originals))
    return set(problems)


def restore(model: nn.Module, changed: Changed = "refuse") -> None:
    """Original bits for every merged weight, if there is any, and the adapter active again that was so before. Raises
    MergeError, before anything is written, where `changed` does not allow what was done to the weights since the merge."""
    record, owner = record_of(model), owner_of(model)
    kept = lost(model, changed)
    for name in kept:
        del record.originals[name]
    for name in list(record.originals):
        _put_back(owner, name, record.originals[name].original, record.originals[name].names)
        del record.originals[name]  # at once: what is interrupted here can be gone on with
    if any(_is_untied(record, owner, name) for name in kept):
        record.untied = None  # what is kept as it is stays apart
    tie_again(model)
    if record.eos is not None:
        record.eos[0].eos_token_id = record.eos[1]
    record.merged, record.eos = {}, None
    record.route.active, record.before_merge = record.before_merge, None


def _is_untied(record: Adapters, owner: nn.Module, name: str) -> bool:
    """Whether a merge has untied this parameter from others."""
    shared = {} if record.untied is None else record.untied.shared
    return name in shared or any(_parameter(owner, name) is parameter for parameter in shared.values())


def tie_again(model: nn.Module) -> None:
    """Give the base the ties back that a merge has taken from it, if it has."""
    record = record_of(model)
    if record.untied is not None:
        tie(owner_of(model), record.untied)
        record.untied = None


def put_back(model: nn.Module, originals: Mapping[str, Original]) -> None:
    """Give these parameters the values from before a merge."""
    for name, original in originals.items():
        _put_back(owner_of(model), name, original, (name,))


def _put_back(owner: nn.Module, name: str, original: Original, names: Sequence[str]) -> None:
    """Give a parameter its values from before a merge, under all of these names: it may have been tied then and not now."""
    W = matrix_of(owner, name)
    back = as_stored(*place_of(owner, name), original.restored(W))
    for parameter in {id(p): p for alias in names if (p := _parameter(owner, alias)) is not None}.values():
        # In this order: the former sets the latter
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            parameter.copy_(back)


def _since_merge(owner: nn.Module, name: str, kept: Kept) -> str | None:
    """Say how a merged weight differs from what the merge made of it; None if it does not."""
    for alias in kept.names:
        parameter = _parameter(owner, alias)
        if parameter is None:
            return "the model no longer has it"
        if in_few_bits(*place_of(owner, alias)):
            return "it was quantised"
        if why := difference(parameter, kept.stamp):
            return why if alias == name else f"{why} as {alias}, which was tied to it"
    others = _tied_since(owner, kept)
    return f"it is tied to {', '.join(others)} now, which would change with it" if others else None


def _tied_since(owner: nn.Module, kept: Kept) -> list[str]:
    """Names of parameters that a merged weight was tied to after the merge."""
    here = {id(_parameter(owner, alias)) for alias in kept.names}
    return [n for p, names in readers(owner, now=True).items() if id(p) in here for n in names if n not in kept.names]


def _parameter(owner: nn.Module, name: str) -> Tensor | None:
    """A parameter by its dotted name, if it is there."""
    try:
        layer, own_name = place_of(owner, name)
    except AttributeError:
        return None
    return layer._parameters.get(own_name)


def _can_be_copied(owner: nn.Module, kept: Kept) -> bool:
    """Tell if the weight that is there now can take the copy from before the merge."""
    there = [(alias, _parameter(owner, alias)) for alias in kept.names]
    same_shape = all(p is not None and tuple(p.shape) == kept.stamp.shape for _, p in there)
    if not (isinstance(kept.original, Copy) and same_shape) or _tied_since(owner, kept):
        return False
    return not any(in_few_bits(*place_of(owner, alias)) for alias, _ in there)


def _why_not_unmerged(owner: nn.Module, problems: Mapping[str, str], originals: Mapping[str, Kept]) -> str:
    """The message: what has changed, and the ways on."""
    stamps = {name: originals[name].stamp for name in problems}
    ways = []
    if len(dtypes := {was.dtype for was in stamps.values()}) == 1:
        (dtype,) = dtypes
        now = {name: _parameter(owner, name) for name in problems}
        if all(
            p is not None and p.dtype != dtype and not difference(p.to(dtype), stamps[name]) for name, p in now.items()
        ):
            ways.append(f"Call model.to({dtype}) first: that gives the merged weights as they were.")
    if all(_can_be_copied(owner, originals[name]) for name in problems):
        ways.append(
            "unmerge(model, changed='restore') puts the copies from before the merge back, whatever was done since."
        )
    ways.append(
        "unmerge(model, changed='keep') leaves these weights as they are now, as the base's own, and restores the others."
    )
    lines = [f"{name}: {why}" for name, why in problems.items()]
    return (
        listing("These merged weights are not what the merge made of them, so W0 cannot be had from them:", lines)
        + "\nNothing was changed. " + "\n".join(ways)
    )  # fmt: skip


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the base as it was before attach, original weights where an adapter is merged."""
    return ((name, tensor.detach()) for name, _, tensor in base_tensors(model))


def base_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """(name, parameter, what it was before attach: itself, if it is not merged) of the base."""
    record = find_record(model)
    merged = record.originals if record else {}
    for name, parameter in named_parameters(model):
        if name in merged:
            yield name, parameter, as_stored(*place_of(owner_of(model), name), before_merge(model, name))
        else:
            yield name, parameter, parameter


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the base as it is, a tied one by its first name."""
    return ((names[0], parameter) for parameter, names in readers(model).items())


def readers(model: nn.Module, *, now: bool = False) -> dict[nn.Parameter, list[str]]:
    """Each parameter of the base → its names, of which a tied one has several. What a merge has untied counts as tied, but for
    the ties that there are `now`."""
    found: dict[nn.Parameter, list[str]] = {}
    record = None if now else find_record(model)
    shared = record.untied.shared if record is not None and record.untied is not None else {}
    for module_name, module in base_modules(model):
        for own_name, parameter in module._parameters.items():
            if parameter is not None:
                name = dotted(module_name, own_name)
                found.setdefault(shared.get(name, parameter), []).append(name)
    return found


def before_merge(model: nn.Module, name: str) -> Tensor:
    """A parameter as a matrix, as it was before a merge. Raises MergeError where that cannot be told any more."""
    owner = owner_of(model)
    kept = record_of(model).originals.get(name)
    if kept is None:
        return matrix_of(owner, name)
    if why := _since_merge(owner, name, kept):
        raise MergeError(_why_not_unmerged(owner, {name: why}, {name: kept}))
    return kept.original.restored(matrix_of(owner, name))


# --- the record -------------------------------------------------------------------------------------------------


def find_record(model: nn.Module) -> Adapters | None:
    """The model's record, also through a wrapper (DDP, torch.compile); None when no adapter is attached."""
    owner = owner_of(model)
    return owner.__dict__.get(RECORD)


def record_of(model: nn.Module) -> Adapters:
    record = find_record(model)
    if record is None:
        raise AdapterError("The model has no adapter: attach or load one first.")
    return record


def known(record: Adapters, name: str) -> str:
    if not isinstance(name, str) or name not in record.attached:
        raise AdapterError(
            f"There is no adapter {name!r}{nearest(str(name), record.attached)}. Attached: {', '.join(record.attached)}."
        )
    return name


def in_use(record: Adapters) -> str:
    """The one adapter that this thread goes through. Raises AdapterError."""
    chosen = record.route.current()
    if isinstance(chosen, Rows):
        raise AdapterError("Rows have adapters of their own in this route block: name the adapter that is meant.")
    if chosen is None:
        raise AdapterError(f"No adapter is active: name one. Attached: {', '.join(record.attached)}.")
    return str(chosen)


def bring(record: Adapters, names: Iterable[str | None]) -> None:
    """See to it that these adapters are on their layers' device."""
    record.residency.bring(names, {*record.route.held(), record.route.active} if record.residency.kept else ())


def in_open_block(record: Adapters, names: Iterable[str]) -> str | None:
    """For messages: that one of these adapters is in use by an open `using` or `route` block, or by a pass, of any thread."""
    held = record.route.held().intersection(names)
    return f"Adapter {min(held)!r} is in use by an open using or route block, or by a pass" if held else None


def merged_names(record: Adapters) -> str:
    """ "Adapter 'a' is" or "Adapters 'a', 'b' are", for messages."""
    names = ", ".join(repr(name) for name in record.merged)
    return f"Adapter {names} is" if len(record.merged) == 1 else f"Adapters {names} are"


def check_free(model: nn.Module, name: str) -> None:
    """Raise AdapterError unless an adapter of this name can be attached now."""
    record = find_record(model) or Adapters()
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"{name!r} cannot name an adapter: a name is a non-empty string without dots.")
    if name in record.attached:
        raise AdapterError(
            f"An adapter {name!r} is attached already. Choose another name, or detach(model, {name!r}) first."
        )
    if record.merged:
        raise AdapterError(f"{merged_names(record)} merged into the base: call unmerge(model) first.")
