"""Which of the attached adapters computes: `use` for a model, `using` for a with-block, `route` for each row of a batch.

Before a route, some rows of a batch are changed, and the parts of the layers' inputs that change are theirs: so it is found where
rows lie. Writes a model's route, and the rows' places into its slots; nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError, ConfigError, nearest
from deltaw.layers.ops.row_forms import key_of, placeholders_of, uneven
from deltaw.layers.ops.rows import Rows
from deltaw.layers.patch import Slot, slot_of
from deltaw.layers.tree import base_modules, evaluating, owner_of
from deltaw.model.record import Adapters, bring, known, merged_names, record_of

_REMOVED: Mapping[str, Any] = {}
"""What a hook that another thread has removed gets for named inputs: PyTorch calls it in the pass in progress, without them."""


def use(model: nn.Module, name: str | None) -> None:
    """Make another attached adapter active; None is the base. One write, whatever the number of layers and adapters.

    It holds for all code but that in a `using` or `route` block; within a block, or a call of `generate`, for that alone. A
    pass that has begun goes on as it began. Raises AdapterError for an unknown name, and while an adapter is merged.
    """
    record = record_of(model)
    _check(record, name)
    bring(record, [name])
    record.route.choose(name)


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """`use` for the length of a with-block and for the code in it alone: other threads, tasks and generators go on as they were.

    Tasks that are spawned in the block, and `asyncio.to_thread`, are in it too; a plain `threading.Thread` is not, and opens a
    block of its own. A generator is in its block while it runs, its caller is not; one under `contextlib.contextmanager` hands
    the block on to the code that enters it. Raises AdapterError as `use` does; in the pass, where a task or thread was started
    beside a generator that is paused in a block, so that it cannot be told what it belongs to.
    """
    record = _record_for_a_block(model)
    _check(record, name)
    bring(record, [name])
    with record.route.block(name):
        yield


@contextlib.contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """For the code in a with-block, as with `using`: each row of a batch goes through the adapter of its name, None through the
    base, all in one pass.

    The batch has one row for each name, and `generate` one prompt: of each it makes a fixed number of rows, one after the other,
    for beams and `num_return_sequences`. Ranks may differ; each row costs its own adapter's arithmetic. A pass stacks the
    adapters' tensors, which takes their bytes once more; `generate` stacks them once. Gradients reach each adapter's A and B.

    Raises AdapterError: for unknown names, all of them; while an adapter is merged; for a model whose layers do not keep the
    rows of the batch apart; in the pass, for a batch of another number of rows.
    """
    record = _record_for_a_block(model)
    if isinstance(names, str) or not isinstance(names, Iterable):
        kind = "string" if isinstance(names, str) else type(names).__name__
        raise AdapterError(f"route takes one name for each row of the batch, not one {kind} ({names!r}).")
    names = list(names)
    if not names:
        raise AdapterError("route needs one name, or None, for each row of the batch: there is none.")
    unknown = [n for n in names if n is not None and not (isinstance(n, str) and n in record.attached)]
    if unknown:
        problems = [*dict.fromkeys(f"{name!r}{nearest(str(name), record.attached)}" for name in unknown)]
        raise AdapterError("There is no adapter of these names:", problems, f"Attached: {', '.join(record.attached)}.")
    for name in dict.fromkeys(names):
        _check(record, name)
    bring(record, names)
    rows = Rows(names)
    if not rows.alike:
        _check_rows_apart(model, record)
    asked = contextlib.nullcontext() if rows.alike else _new_forms_asked(model, record)
    with record.route.block(rows), asked:
        yield


def keep_on_device(model: nn.Module, most: int) -> None:
    """How many of the adapters that were loaded with `host=True` may be on their layers' device at once: those that were used
    last; while more are in use, all of these. 16 unless set. Raises ConfigError for less than one."""
    if most < 1:
        raise ConfigError(f"most is {most}; at least one adapter must be on the device to be used.")
    record = record_of(model)
    record.residency.most = most
    record.residency.bring([], {*record.route.held(), record.route.active})


def _check(record: Adapters, name: str | None) -> None:
    if name is None:
        return
    known(record, name)
    if record.merged:
        raise AdapterError(f"{merged_names(record)} merged into the base: call unmerge(model) before {name!r} is used.")


def _record_for_a_block(model: nn.Module) -> Adapters:
    if isinstance(model, nn.DataParallel):
        raise AdapterError(
            "DataParallel computes in threads of its own, which see no block of this one: switch by use(model, name)."
        )
    return record_of(model)


def _check_rows_apart(model: nn.Module, record: Adapters) -> None:
    """Raise AdapterError where adapted layers are known to mix the rows of a batch. Where nothing is known yet, it is found with
    the inputs that transformers keeps for trying a model of this class out."""
    if record.rows_mixed is None and (inputs := trial_inputs(owner_of(model))) is not None:
        _note(record, look_for_rows(model, (), inputs))
    if record.rows_mixed:
        raise AdapterError("The rows of a batch cannot be told apart in these layers:", record.rows_mixed)


def _note(record: Adapters, found: tuple[list[str], set[str]] | None) -> None:
    if found is not None:
        mixed, reached = found
        record.rows_mixed = (record.rows_mixed or []) + mixed
        record.rows_reached |= reached


@contextlib.contextmanager
def _new_forms_asked(model: nn.Module, record: Adapters) -> Iterator[None]:
    """Where it is not known of all layers whether they keep rows apart, and where a model folds images or windows into the batch:
    while open, this thread's first batch of each form tells it. Its pass then raises AdapterError if they do not."""
    owner = owner_of(model)
    slots = {name: slot for name, module in base_modules(owner) if (slot := slot_of(module)) is not None}
    if not _open_questions(record, slots):
        yield
        return
    here = threading.get_ident()

    def ask(owner: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any] = _REMOVED) -> None:
        given: dict[Any, Any] = {**dict(enumerate(inputs)), **named}
        size = next((len(v) for v in given.values() if isinstance(v, Tensor) and v.dim()), 0)
        key = key_of(given, size)
        if threading.get_ident() != here or key in record.rows_asked or not _open_questions(record, slots):
            return
        record.rows_asked.add(key)  # the passes to come are of the same form
        found = look_for_rows(owner, inputs, named)
        if found is None:
            record.rows_asked.discard(key)
        _note(record, found)
        _check_rows_apart(model, record)

    handle = owner.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _open_questions(record: Adapters, slots: dict[str, Slot]) -> bool:
    """Whether there are layers that no batch has reached yet, or that were given several parts for a row."""
    if any(name not in record.rows_reached for name in slots):
        return True
    return any(found != {1} for slot in slots.values() if not slot.rows_at for found in slot.parts.values())


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
        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any] = _REMOVED) -> None:
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
