"""Originals of merged weights, kept until `unmerge` gives them back, and the check that the merged weights are unchanged.

Every way back begins with that check: a weight that was changed since the merge would give other values than the original ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from deltaw.errors import MergeError, listing
from deltaw.layers.kinds import as_stored, in_few_bits
from deltaw.layers.ops.checksums import difference, stamp
from deltaw.layers.ops.undo import Copy, Kept, Original
from deltaw.layers.ties import tie
from deltaw.layers.tree import matrix_of, owner_of, place_of
from deltaw.model.record import Adapters, find_record, named_parameters, on_whole_layers, readers, record_of

Changed = Literal["refuse", "restore", "keep"]
"""The treatment of merged weights that were changed since: see `unmerge`."""
_Names = Mapping[int, Sequence[str]]
"""Identity of a parameter → its names."""


def stamped(owner: nn.Module, originals: Mapping[str, Original]) -> dict[str, Kept]:
    """Return the originals with stamps of the merged weights, which show later whether these were changed."""
    names = {name: tuple(same) for same in readers(owner, now=True).values() for name in same}
    kept = {}
    for name, original in originals.items():
        parameter = _parameter(owner, name)
        assert parameter is not None
        kept[name] = Kept(original, stamp(parameter), names[name])
    return kept


@on_whole_layers
def lost(model: nn.Module, changed: Changed) -> set[str]:
    """Return the names of merged weights that were changed since, so that they cannot be given back.

    With `changed` "restore" only those count that cannot take their copies. Raises MergeError with all of them unless `changed`
    is "keep".
    """
    record, owner = record_of(model), owner_of(model)
    ties = _names(owner)
    problems = {n: why for n, kept in record.originals.items() if (why := _change_since(owner, n, kept, ties))}
    if changed == "restore":
        problems = {n: why for n, why in problems.items() if not _can_take_copy(owner, record.originals[n], ties)}
    if problems and changed != "keep":
        raise MergeError(_why_not_unmerged(owner, problems, record.originals))
    return set(problems)


@on_whole_layers
def restore(model: nn.Module, changed: Changed = "refuse") -> None:
    """Give all merged weights their original bits, and make the adapter active that was so before the merge.

    Raises MergeError as `lost` does, before anything is written.
    """
    record, owner = record_of(model), owner_of(model)
    left_as_they_are = lost(model, changed)
    for name in left_as_they_are:
        del record.originals[name]
    for name, kept in list(record.originals.items()):
        try:
            _put_back(owner, name, kept.original, kept.names)
            del record.originals[name]  # one by one, so that after an interrupt another call restores the rest
        except BaseException:  # an interrupt may come between the two
            if all(difference(p, kept.stamp) for alias in kept.names if (p := _parameter(owner, alias)) is not None):
                record.originals.pop(name, None)
            raise
    if any(_was_untied(record, owner, name) for name in left_as_they_are):
        record.untied = None  # weights that keep their changes are not tied again
    tie_again(model)
    stop_as_before(record)
    record.merged, record.route.active, record.before_merge = {}, record.before_merge, None


def _was_untied(record: Adapters, owner: nn.Module, name: str) -> bool:
    """Return whether the merge has untied this parameter from others."""
    shared = {} if record.untied is None else record.untied.shared
    return name in shared or any(_parameter(owner, name) is parameter for parameter in shared.values())


def stop_as_before(record: Adapters) -> None:
    """Let the model stop at the base's end tokens alone again."""
    if record.eos is not None:
        config, before = record.eos
        config.eos_token_id = before
        record.eos = None


def tie_again(model: nn.Module) -> None:
    """Give the base the ties back that a merge has taken from it, if it has."""
    record = record_of(model)
    if record.untied is not None:
        tie(owner_of(model), record.untied)
        record.untied = None


def put_back(model: nn.Module, originals: Mapping[str, Original]) -> None:
    """Give these parameters their values from before a merge."""
    for name, original in originals.items():
        _put_back(owner_of(model), name, original, (name,))


def _put_back(owner: nn.Module, name: str, original: Original, names: Sequence[str]) -> None:
    """Give a parameter its values from before a merge under all of these names, which may be tied no longer."""
    W = matrix_of(owner, name)
    values = as_stored(*place_of(owner, name), original.restored(W))
    for parameter in {id(p): p for alias in names if (p := _parameter(owner, alias)) is not None}.values():
        # In this order: inference_mode also sets whether gradients are recorded
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            parameter.copy_(values)


def _change_since(owner: nn.Module, name: str, kept: Kept, ties: _Names) -> str | None:
    """Return how a merged weight differs from what the merge made of it; None if it does not."""
    for alias in kept.names:
        parameter = _parameter(owner, alias)
        if parameter is None:
            return "the model no longer has it"
        if in_few_bits(*place_of(owner, alias)):
            return "it was quantised"
        if why := difference(parameter, kept.stamp):
            return why if alias == name else f"{why} as {alias}, which was tied to it"
    others = _tied_since(owner, kept, ties)
    return f"it is tied to {', '.join(others)} now, which would change with it" if others else None


def _names(owner: nn.Module) -> _Names:
    """Return all names of each parameter as the model is now."""
    return {id(parameter): names for parameter, names in readers(owner, now=True).items()}


def _tied_since(owner: nn.Module, kept: Kept, ties: _Names) -> list[str]:
    """Return the names of parameters that a merged weight was tied to after the merge."""
    parameters = dict.fromkeys(id(_parameter(owner, alias)) for alias in kept.names)
    return [name for p in parameters for name in ties.get(p, ()) if name not in kept.names]


def _parameter(owner: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter by its dotted name; None if the model has none of that name."""
    try:
        layer, own_name = place_of(owner, name)
    except AttributeError:
        return None
    return layer._parameters.get(own_name)


def _can_take_copy(owner: nn.Module, kept: Kept, ties: _Names) -> bool:
    """Return whether the weight that is there now can take the copy from before the merge."""
    parameters = [_parameter(owner, alias) for alias in kept.names]
    same_shape = all(p is not None and tuple(p.shape) == kept.stamp.shape for p in parameters)
    if not (isinstance(kept.original, Copy) and same_shape) or _tied_since(owner, kept, ties):
        return False
    return not any(in_few_bits(*place_of(owner, alias)) for alias in kept.names)


def _why_not_unmerged(owner: nn.Module, problems: Mapping[str, str], originals: Mapping[str, Kept]) -> str:
    """Return the message: what has changed, and what can be done."""
    stamps = {name: originals[name].stamp for name in problems}
    ways = []
    if len(dtypes := {was.dtype for was in stamps.values()}) == 1:
        (dtype,) = dtypes
        now = {name: _parameter(owner, name) for name in problems}
        if all(
            p is not None and p.dtype != dtype and not difference(p.to(dtype), stamps[name]) for name, p in now.items()
        ):
            ways.append(f"Call model.to({dtype}) first: that gives the merged weights as they were.")
    ties = _names(owner)
    if all(_can_take_copy(owner, originals[name], ties) for name in problems):
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


# --- the base as it was -------------------------------------------------------------------------------------------


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the base as it was before attach, with the original values of merged weights."""
    return ((name, tensor.detach()) for name, _, tensor in base_tensors(model))


def base_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yield (name, parameter, its values before attach) of the base; the values are the parameter itself unless it is merged."""
    record, owner = find_record(model), owner_of(model)
    merged = record.originals if record else {}
    ties = _names(owner) if merged else {}
    for name, parameter in named_parameters(model):
        if name in merged:
            yield name, parameter, as_stored(*place_of(owner, name), _before(owner, name, merged[name], ties))
        else:
            yield name, parameter, parameter


def before_merge(model: nn.Module, name: str) -> Tensor:
    """Return a parameter as a matrix with its values from before a merge. Raises MergeError if these are lost."""
    owner = owner_of(model)
    kept = record_of(model).originals.get(name)
    return matrix_of(owner, name) if kept is None else _before(owner, name, kept, _names(owner))


def _before(owner: nn.Module, name: str, kept: Kept, ties: _Names) -> Tensor:
    """Return a merged weight as it was before. Raises MergeError if it was changed since."""
    if why := _change_since(owner, name, kept, ties):
        raise MergeError(_why_not_unmerged(owner, {name: why}, {name: kept}))
    return kept.original.restored(matrix_of(owner, name))
