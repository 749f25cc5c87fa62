"""In which dimension of each adapted layer's input the rows of a batch lie.

A `route` block needs this, since each row goes through its own adapter in every layer. Models transpose, pack, fold and sort
rows on the way, so it is measured. The base computes a batch as it is, and again with some rows replaced by the next row. The
parts of a layer's input that change are those rows'. A layer whose input follows the rows in no dimension cannot be routed.

Writes the places into the layers' slots and what is known into the model's record; changes nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError
from deltaw.layers.ops.row_forms import key_of, placeholders_of, uneven
from deltaw.layers.patch import Slot, slot_of
from deltaw.layers.tree import base_modules, evaluating, owner_of
from deltaw.model.passes import by_name
from deltaw.model.record import Adapters, record_of

_REMOVED: Mapping[str, object] = {}
"""The keyword inputs of a hook that another thread has removed: PyTorch calls it in the pass in progress, without them."""


def check_rows_apart(model: nn.Module, record: Adapters) -> None:
    """Raise AdapterError if adapted layers are known to mix the rows of a batch.

    If nothing is known yet, the model is tried with the inputs that transformers keeps for trying a model of its class.
    """
    if record.rows_mixed is None and (inputs := _inputs_for_trying(owner_of(model))) is not None:
        _note(record, _try_batch(model, _batch_of((), inputs)))
    if record.rows_mixed:
        raise AdapterError("The rows of a batch cannot be told apart in these layers:", record.rows_mixed)


@contextlib.contextmanager
def trying_new_forms(model: nn.Module, record: Adapters) -> Iterator[None]:
    """While open, try this thread's first batch of each form, and raise AdapterError in its pass if layers mix its rows.

    Only batches that may tell something new are tried: a layer was not reached yet, or gets several parts for a row, as models
    with images or windows have them.
    """
    owner = owner_of(model)
    slots = {name: slot for name, module in base_modules(owner) if (slot := slot_of(module)) is not None}
    if not _is_open(record, slots):
        yield
        return
    here = threading.get_ident()

    def try_first(owner: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object] = _REMOVED) -> None:
        batch = _batch_of(inputs, named)
        form = key_of(batch.inputs, batch.count)
        if threading.get_ident() != here or form in record.rows_asked or not _is_open(record, slots):
            return
        record.rows_asked.add(form)  # the trial's own passes have this form too
        trial = _try_batch(owner, batch)
        if trial is None:
            record.rows_asked.discard(form)
        _note(record, trial)
        check_rows_apart(model, record)

    handle = owner.register_forward_pre_hook(try_first, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _is_open(record: Adapters, slots: Mapping[str, Slot]) -> bool:
    """Return whether there are layers that no trial has reached, or that are given several parts for a row."""
    if any(name not in record.rows_reached for name in slots):
        return True
    return any(parts != {1} for slot in slots.values() if not slot.rows_at for parts in slot.parts.values())


# --- a trial ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """The inputs of one call of a model."""

    inputs: Mapping[int | str, object]
    """Place or name → value."""
    positional: int
    """The number of inputs by place."""
    count: int
    """Rows: the length of the first tensor."""


@dataclass(frozen=True)
class _Replaced:
    """Rows of a batch that were replaced by the next row."""

    rows: Sequence[int]
    count: int
    differing: Sequence[bool]
    """For each row of the batch, whether the next one has other content."""


@dataclass(frozen=True)
class _Call:
    """One input of a layer in a pass with replaced rows."""

    shape: tuple[int, ...]
    follows: frozenset[int] | None
    """The dimensions that changed as the rows did; None for an input without entries, which tells nothing."""


@dataclass(frozen=True)
class _Trial:
    """The results of a trial."""

    mixed: list[str]
    """Messages on layers whose input follows the rows in no dimension."""
    reached: set[str]
    """Names of the layers that had an input."""


def _note(record: Adapters, trial: _Trial | None) -> None:
    """Add a trial's outcome to the record."""
    if trial is not None:
        record.rows_mixed = (record.rows_mixed or []) + trial.mixed
        record.rows_reached |= trial.reached


@torch.no_grad()
def _try_batch(model: nn.Module, batch: _Batch) -> _Trial | None:
    """Pass a batch through the base, as it is and with rows replaced, and write the rows' places into the layers' slots.

    Passes are in evaluation mode and draw the same random numbers. The trial is empty if the model does not take the batch. It is
    None, and nothing is passed through, if all rows are the same or have different numbers of parts.
    """
    owner, count = owner_of(model), batch.count
    if count < 2 or uneven(_tensors(batch), count, placeholders_of(getattr(owner, "config", None))):
        return None
    differing = _differing(batch)
    if not any(differing):
        return None
    inputs: dict[str, list[Tensor]] = {}
    compared: dict[str, list[list[_Call]]] = {}
    with evaluating(owner), record_of(model).route.block(None):
        if not _pass(owner, batch, [], lambda name, x: inputs.setdefault(name, []).append(x.detach().clone())):
            return _Trial([], set())
        for rows in _sets_of_rows(count):
            calls = _compared_pass(owner, batch, inputs, _Replaced(rows, count, differing))
            if calls is None:
                return _Trial([], set())
            for name in inputs:
                compared.setdefault(name, []).append(calls.get(name, []))
    reached = {name: xs for name, xs in inputs.items() if any(x.numel() for x in xs)}
    mixed = []
    for name, xs in reached.items():
        dimensions, odd = _agreed(len(xs), compared[name])
        slot = slot_of(owner.get_submodule(name))
        if not dimensions:
            mixed.append(f"{name}: its input is {odd or tuple(xs[0].shape)} for a batch of {count}")
        elif slot is not None:
            slot.rows_at = min(dimensions)
            parts = slot.parts.setdefault(key_of(batch.inputs, count), set())
            parts.update(x.shape[slot.rows_at] // count for x in xs)
    return _Trial(mixed, set(reached))


def _compared_pass(
    model: nn.Module, batch: _Batch, inputs: Mapping[str, Sequence[Tensor]], replaced: _Replaced
) -> dict[str, list[_Call]] | None:
    """Pass a batch with replaced rows through, and compare each layer's inputs, call by call, with those of the first pass."""
    calls: dict[str, list[_Call]] = {}

    def compare(name: str, x: Tensor) -> None:
        before, so_far = inputs.get(name, ()), calls.setdefault(name, [])
        first = before[len(so_far)] if len(so_far) < len(before) else None
        so_far.append(_compare(first, x, replaced))

    return calls if _pass(model, batch, replaced.rows, compare) else None


def _pass(model: nn.Module, batch: _Batch, rows: Sequence[int], see: Callable[[str, Tensor], None]) -> bool:
    """Pass a batch through with these rows replaced, and call `see` with each adapted layer's name and input.

    Return whether the model takes the batch. Random numbers are those of one seed, and the caller's generators stay as they were.
    """
    here = threading.get_ident()

    def watching(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object] = _REMOVED) -> None:
            x = next((v for v in (*inputs, *named.values()) if isinstance(v, Tensor)), None)
            if x is not None and threading.get_ident() == here:  # other threads may be computing as well
                see(name, x)

        return hook

    layers = [(name, module) for name, module in base_modules(model) if slot_of(module) is not None]
    hooks = [module.register_forward_pre_hook(watching(name), with_kwargs=True) for name, module in layers]
    replaced = _with_replaced(batch, rows)
    positional = [replaced[place] for place in range(batch.positional)]
    named = {name: value for name, value in replaced.items() if isinstance(name, str)}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model(*positional, **named)
    except Exception:  # a model that does not take a batch may raise anything
        return False
    finally:
        for handle in hooks:
            handle.remove()
    return True


# --- batches and their rows ---------------------------------------------------------------------------------------


def _batch_of(inputs: tuple[object, ...], named: Mapping[str, object]) -> _Batch:
    values = by_name(inputs, named)
    count = next((len(v) for v in values.values() if isinstance(v, Tensor) and v.dim()), 0)
    return _Batch(values, len(inputs), count)


def _tensors(batch: _Batch) -> dict[int | str, Tensor]:
    return {name: value for name, value in batch.inputs.items() if isinstance(value, Tensor) and value.dim()}


def _with_replaced(batch: _Batch, rows: Sequence[int]) -> dict[int | str, object]:
    """Return the inputs with each of these rows replaced by the next one."""
    source = torch.arange(batch.count)
    source[list(rows)] = (source[list(rows)] + 1) % batch.count

    def replaced(value: object) -> object:
        if _has_rows(value, batch.count):
            parts = value.reshape(batch.count, len(value) // batch.count, *value.shape[1:])
            return parts[source.to(value.device)].flatten(0, 1)
        return value if isinstance(value, Tensor) else copy.deepcopy(value)  # a cache would keep what is passed here

    return {name: replaced(value) for name, value in batch.inputs.items()}


def _differing(batch: _Batch) -> list[bool]:
    """Return for each row whether the next one has other content."""
    differing = torch.zeros(batch.count, dtype=torch.bool)
    for value in batch.inputs.values():
        if _has_rows(value, batch.count):
            rows = value.detach().reshape(batch.count, value.numel() // batch.count)
            differing |= (rows != rows.roll(-1, 0)).any(1).cpu()
    return [bool(differs) for differs in differing]


def _sets_of_rows(count: int) -> Iterator[list[int]]:
    """Yield sets of rows to replace; of any two rows, one set has one of them alone."""
    yield list(range(0, count, 2))
    for bit in range((count - 1).bit_length()):
        yield [row for row in range(count) if row >> bit & 1]


def _has_rows(value: object, count: int) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor with the same number of parts for each row."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) > 0 and len(value) % count == 0


# --- a layer's input and the rows ---------------------------------------------------------------------------------


_CLOSE = 1e-3
"""Tolerance for a part of an input whose row was not replaced, as a share of the input's largest entry."""


def _compare(first: Tensor | None, x: Tensor, replaced: _Replaced) -> _Call:
    """Compare a layer's input with the one that it had in the first pass."""
    if first is None or x.shape != first.shape:
        return _Call(tuple(x.shape), frozenset())
    if not x.numel():
        return _Call(tuple(x.shape), None)
    dimensions = _candidates(first, replaced.count)
    return _Call(tuple(x.shape), frozenset(d for d in dimensions if _follows(first, x, d, replaced)))


def _agreed(inputs: int, passes: Sequence[Sequence[_Call]]) -> tuple[frozenset[int], tuple[int, ...]]:
    """Return the dimensions that followed the rows in all calls of all passes, and the first shape that left none.

    A pass with another number of calls than the first pass had `inputs` leaves none.
    """
    dimensions: frozenset[int] | None = None
    odd: tuple[int, ...] = ()
    for calls in passes:
        for call in calls:
            if call.follows is not None:
                dimensions = call.follows if dimensions is None else dimensions & call.follows
                odd = odd or (() if dimensions else call.shape)
        if len(calls) != inputs:
            dimensions = frozenset()
    return dimensions or frozenset(), odd


def _candidates(x: Tensor, count: int) -> list[int]:
    """Return the dimensions whose size allows them to hold the rows; only the outermost may hold several parts for a row."""
    outer = next((d for d in range(x.dim() - 1) if x.shape[d] != 1), None)
    first = [] if outer is None or x.shape[outer] == 0 or x.shape[outer] % count else [outer]
    return first + [d for d in range(x.dim() - 1) if x.shape[d] == count and d not in first]


def _follows(x: Tensor, other: Tensor, dimension: int, replaced: _Replaced) -> bool:
    """Return whether `other` is x with other parts for the replaced rows alone.

    A replaced row's part changed, unless the next row has the same content or the same part.
    """
    one = x.float().movedim(dimension, 0).reshape(replaced.count, -1)
    two = other.float().movedim(dimension, 0).reshape(replaced.count, -1)
    close = _CLOSE * float(one.abs().max().clamp_min(1e-12))
    moved = ((one - two).abs() > close).any(1).tolist()
    same_as_next = ((one - one.roll(-1, 0)).abs() <= close).all(1).tolist()
    return all(
        (moved[row] or same_as_next[row] or not replaced.differing[row]) if row in replaced.rows else not moved[row]
        for row in range(replaced.count)
    )


def _inputs_for_trying(model: nn.Module) -> dict[str, Tensor] | None:
    """Return two rows of the inputs that transformers keeps for trying a model of this class; None for other models."""
    try:
        dummies: object = getattr(model, "dummy_inputs", None)
        device = next(model.parameters()).device
        if not isinstance(dummies, Mapping):
            return None
        return {key: value[:2].to(device) for key, value in dummies.items() if value.shape[0] >= 2}
    except (AttributeError, TypeError, StopIteration):  # values that are no tensors; a model without parameters
        return None
