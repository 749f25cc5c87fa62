"""Which of the attached adapters computes: `use` for a model, `using` for a with-block, `route` for each row of a batch. Writes a
model's route and nothing else.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from deltaw.attached import Adapters, bring, known, merged_names, record_of
from deltaw.errors import AdapterError, ConfigError, listing, nearest
from deltaw.layers.ops.row_forms import key_of
from deltaw.layers.ops.rows import Rows
from deltaw.layers.patch import Slot, slot_of
from deltaw.layers.tree import base_modules, owner_of
from deltaw.row_order import look_for_rows, trial_inputs


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
        raise AdapterError(
            listing("There is no adapter of these names:", problems) + f"\nAttached: {', '.join(record.attached)}."
        )
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
        raise AdapterError(listing("The rows of a batch cannot be told apart in these layers:", record.rows_mixed))


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

    def ask(owner: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
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
