"""Which of the attached adapters computes: `use` for a model, `using` for a with-block, `route` for each row of a batch. Writes a
model's route and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.attached import Adapters, base_modules, bring, known, merged_names, owner_of, record_of
from deltaw.errors import AdapterError, ConfigError, listing, nearest
from deltaw.modes import evaluating
from deltaw.rows import Rows
from deltaw.slots import slot_of


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
        if record.rows_mixed is None:
            record.rows_mixed = _mixing_layers(model)
        if record.rows_mixed:
            raise AdapterError(listing("The rows of a batch cannot be told apart in these layers:", record.rows_mixed))
    asked = contextlib.nullcontext() if rows.alike else _first_batch_asked(model, record)
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


def _mixing_layers(model: nn.Module) -> list[str] | None:
    """Adapted layers whose input does not begin with the rows of the batch, found with the inputs that transformers keeps for
    trying a model of this class out. None for a model that has none, or that needs others besides."""
    inputs = _two_rows(owner_of(model))
    return None if inputs is None else _mixed_by(model, (), inputs)


@contextlib.contextmanager
def _first_batch_asked(model: nn.Module, record: Adapters) -> Iterator[None]:
    """Where it is not known yet whether the layers keep rows apart: while open, this thread's first batch tells it. Its pass then
    raises AdapterError if they do not."""
    if record.rows_mixed is not None:
        yield
        return
    here = threading.get_ident()

    def ask(owner: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if threading.get_ident() != here or record.rows_mixed is not None:
            return
        handle.remove()
        record.rows_mixed = _mixed_by(owner, inputs, named)
        if record.rows_mixed:
            raise AdapterError(listing("The rows of a batch cannot be told apart in these layers:", record.rows_mixed))

    handle = owner_of(model).register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _mixed_by(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[str] | None:
    """Adapted layers whose input does not begin with the rows of the batch (time-first models, experts that see the tokens
    sorted), found by passing a batch through the base, with its rows in both orders. None where the model does not take it, and
    where its rows are all the same."""
    owner: Any = owner_of(model)
    batch: dict[Any, Any] = {**dict(enumerate(inputs)), **named}
    count = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)
    turned = {key: v.flip(0) if _has_rows(v, count) else v for key, v in batch.items()}
    if count < 2 or all(torch.equal(batch[k], v) for k, v in turned.items() if _has_rows(v, count)):
        return None
    seen: list[dict[str, Tensor]] = []
    with evaluating(owner), record_of(model).route.block(None):
        for rows in (batch, turned):
            seen.append({})
            # A cache would keep what is passed here
            rows = {key: v if isinstance(v, Tensor) else copy.deepcopy(v) for key, v in rows.items()}
            places = [rows.pop(i) for i in range(len(inputs))]
            if not _noted(owner, places, rows, seen[-1]):
                return None
    return [
        f"{name}: its input is {tuple(x.shape)} for a batch of {count}"
        for name, x in seen[0].items()
        if not _swapped(x, seen[1].get(name), count)
    ]


def _has_rows(value: Any, count: int) -> bool:
    """Whether it is a tensor with a part for each of so many rows."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count


def _two_rows(model: Any) -> dict[str, Tensor] | None:
    """The inputs that transformers keeps for trying a model of this class out, two rows of them."""
    try:
        device = next(model.parameters()).device
        return {key: value[:2].to(device) for key, value in model.dummy_inputs.items() if value.shape[0] >= 2}
    except (AttributeError, TypeError, StopIteration):
        return None


def _noted(model: Any, inputs: Sequence[Any], named: dict[Any, Any], seen: dict[str, Tensor]) -> bool:
    """Whether the model takes these inputs; what its adapted layers are then given."""
    here = threading.get_ident()

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and threading.get_ident() == here:  # other threads may be computing as well
                seen.setdefault(name, inputs[0])

        return hook

    hooks = [m.register_forward_pre_hook(note(n)) for n, m in base_modules(model) if slot_of(m) is not None]
    try:
        model(*inputs, **named)
    except Exception:  # whatever a model raises: it does not take them
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


def _swapped(x: Tensor, other: Tensor | None, count: int) -> bool:
    """Whether `other` is `x` with the `count` rows of the batch in the other order."""
    if other is None or x.shape != other.shape or x.dim() < 2 or x.shape[0] % count:
        return False
    x, other = x.float(), other.float()
    parts = x.reshape(count, -1), other.reshape(count, -1).flip(0)
    return torch.allclose(*parts, rtol=1e-2, atol=1e-3 * float(x.abs().max().clamp_min(1e-12)))
