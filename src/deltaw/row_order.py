"""Where the rows of a batch lie in what a model's adapted layers are given: some rows are changed, and the parts of the layers'
inputs that change are theirs. Knows models with a record; writes what it finds into the layers' slots.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.attached import record_of
from deltaw.layers.ops.row_forms import key_of, placeholders_of, uneven
from deltaw.layers.patch import slot_of
from deltaw.layers.tree import base_modules, evaluating, owner_of

_CLOSE = 1e-3
"""How far an input that no row of which was changed may be off, as a share of its largest entry."""


@dataclass
class _Batch:
    """A batch, and itself with the content of other rows in some of its rows."""

    inputs: dict[Any, Any]
    count: int

    def changed(self, rows: Sequence[int]) -> dict[Any, Any]:
        """Each of these rows has the content of the next one."""
        source = torch.arange(self.count)
        source[list(rows)] = (source[list(rows)] + 1) % self.count
        return {key: self._taken(value, source) for key, value in self.inputs.items()}

    def differing(self) -> list[bool]:
        """Whether each row has other content than the next one."""
        found = torch.zeros(self.count, dtype=torch.bool)
        for value in self.inputs.values():
            if self._has_rows(value):
                rows = value.detach().reshape(self.count, -1)
                found |= (rows != rows.roll(-1, 0)).any(1).cpu()
        return found.tolist()

    def sets(self) -> Iterator[list[int]]:
        """Sets of rows to change: for any two rows, one that has one of them alone."""
        yield list(range(0, self.count, 2))
        for bit in range((self.count - 1).bit_length()):
            yield [row for row in range(self.count) if row >> bit & 1]

    def _has_rows(self, value: Any) -> bool:
        """Whether it is a tensor with as many parts for each row."""
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) > 0 and len(value) % self.count == 0

    def _taken(self, value: Any, source: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)  # a cache would keep what is passed here
        if not self._has_rows(value):
            return value
        return value.unflatten(0, (self.count, -1))[source.to(value.device)].flatten(0, 1)


@dataclass
class _Seen:
    """A layer's inputs, call by call, and the dimensions that may have the batch's rows."""

    calls: list[Tensor] = field(default_factory=list)
    places: set[int] | None = None
    call: int = 0
    odd: tuple[int, ...] = ()
    """The shape of an input in which no dimension has the rows."""

    def compare(self, x: Tensor, count: int, rows: Sequence[int], differing: Sequence[bool]) -> None:
        """Take the places away whose parts changed where the batch did not, or did not where it did."""
        first = self.calls[self.call] if self.call < len(self.calls) else None
        self.call += 1
        if first is None or x.shape != first.shape:
            self.places, self.odd = set(), self.odd or tuple(x.shape)
            return
        if not x.numel():  # nothing of this batch came here
            return
        found = {place for place in _places(first, count) if _follows(first, x, place, count, rows, differing)}
        self.places = found if self.places is None else self.places & found
        self.odd = self.odd if self.places or self.odd else tuple(x.shape)


def _places(x: Tensor, count: int) -> list[int]:
    """The dimensions that could have the rows, by their sizes; several parts for a row only in the outermost one."""
    outer = next((d for d in range(x.dim() - 1) if x.shape[d] != 1), None)
    first = [] if outer is None or x.shape[outer] == 0 or x.shape[outer] % count else [outer]
    return first + [d for d in range(x.dim() - 1) if x.shape[d] == count and d not in first]


def _follows(x: Tensor, other: Tensor, place: int, count: int, rows: Sequence[int], differing: Sequence[bool]) -> bool:
    """Whether `other` is x with other parts for these rows: those that differ changed, or are as the next row's were."""
    one = x.float().movedim(place, 0).reshape(count, -1)
    two = other.float().movedim(place, 0).reshape(count, -1)
    close = _CLOSE * float(one.abs().max().clamp_min(1e-12))
    moved = ((one - two).abs() > close).any(1).tolist()
    same_as_next = ((one - one.roll(-1, 0)).abs() <= close).all(1).tolist()
    return all(
        (moved[row] or same_as_next[row] or not differing[row]) if row in rows else not moved[row]
        for row in range(count)
    )


@torch.no_grad()
def look_for_rows(
    model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[list[str], set[str]] | None:
    """Pass a batch through the base, as it is and with some of its rows changed, in evaluation and with the same random draws.
    Gives the adapted layers in whose inputs no dimension has the batch's rows (experts that see the tokens sorted, what all rows
    share), said with the shapes, and the names of those that were reached; the others' slots then say where the rows are. Both
    are empty where the model does not take the batch. None for one whose rows are all the same, or have parts of different
    numbers: nothing was passed through."""
    owner: Any = owner_of(model)
    given: dict[Any, Any] = {**dict(enumerate(inputs)), **named}
    count = next((len(v) for v in given.values() if isinstance(v, Tensor) and v.dim()), 0)
    batch = _Batch(given, count)
    if count < 2 or uneven(_tensors(given), count, placeholders_of(getattr(owner, "config", None))):
        return None
    differing = batch.differing()
    if not any(differing):
        return None
    seen: dict[str, _Seen] = {}
    with evaluating(owner), record_of(model).route.block(None):
        if not _passed(owner, len(inputs), batch.changed([]), seen, None):
            return [], set()
        for rows in batch.sets():
            for each in seen.values():
                each.call = 0
            if not _passed(owner, len(inputs), batch.changed(rows), seen, (count, rows, differing)):
                return [], set()
            for each in seen.values():
                each.places = each.places if each.call == len(each.calls) else set()
    seen = {name: each for name, each in seen.items() if any(x.numel() for x in each.calls)}
    _note_places(owner, seen, key_of(given, count), count)
    mixed = [
        f"{name}: its input is {each.odd or tuple(each.calls[0].shape)} for a batch of {count}"
        for name, each in seen.items()
        if not each.places
    ]
    return mixed, set(seen)


def _tensors(given: Mapping[Any, Any]) -> dict[Any, Tensor]:
    return {n: v for n, v in given.items() if isinstance(v, Tensor) and v.dim()}


def _note_places(model: nn.Module, seen: Mapping[str, _Seen], key: Any, count: int) -> None:
    """Write where the rows are into the slots."""
    for name, module in base_modules(model):
        slot, each = slot_of(module), seen.get(name)
        if slot is not None and each is not None and each.places:
            slot.rows_at = min(each.places)
            slot.parts.setdefault(key, set()).update(x.shape[slot.rows_at] // count for x in each.calls)


def _passed(model: Any, positional: int, batch: dict[Any, Any], seen: dict[str, _Seen], against: Any) -> bool:
    """Whether the model takes these inputs. What its adapted layers are given is kept, or compared with what was, `against` a
    change of some rows. Random draws are those of one seed, and the callers' go on as they were."""
    here = threading.get_ident()

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = next((v for v in (*inputs, *named.values()) if isinstance(v, Tensor)), None)
            if x is None or threading.get_ident() != here:  # other threads may be computing as well
                return
            each = seen.setdefault(name, _Seen())
            if against is None:
                each.calls.append(x.detach().clone())
            else:
                each.compare(x, *against)

        return hook

    modules = [(n, m) for n, m in base_modules(model) if slot_of(m) is not None]
    hooks = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in modules]
    places = [batch.pop(i) for i in range(positional)]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model(*places, **batch)
    except Exception:  # whatever a model raises: it does not take them
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


def trial_inputs(model: Any) -> dict[str, Tensor] | None:
    """The inputs that transformers keeps for trying a model of this class out, two rows of them; None for a model without."""
    try:
        device = next(model.parameters()).device
        return {key: value[:2].to(device) for key, value in model.dummy_inputs.items() if value.shape[0] >= 2}
    except (AttributeError, TypeError, StopIteration):
        return None
