"""Which of the attached adapters computes: `use` for a model, `using` for a with-block, `route` for each row of a batch. Writes a
model's route and nothing else.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
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

    The batch has one row for each name; in `generate` a fixed number of rows for each, one after the other, as it makes them for
    beams and `num_return_sequences`. Ranks may differ; each row costs its own adapter's arithmetic. A pass stacks the adapters'
    tensors, which takes their bytes once more; `generate` stacks them once. Gradients reach each adapter's A and B.

    Raises AdapterError: for unknown names, all of them; while an adapter is merged; for a model whose layers do not keep the
    rows of the batch apart; in the pass, for a batch of another number of rows.
    """
    record = _record_for_a_block(model)
    if isinstance(names, str):
        raise AdapterError(f"route takes one name for each row of the batch, not one string ({names!r}).")
    names = list(names)
    if not names:
        raise AdapterError("route needs one name, or None, for each row of the batch: there is none.")
    unknown = dict.fromkeys(n for n in names if n is not None and n not in record.attached)
    if unknown:
        problems = [f"{name!r}{nearest(str(name), record.attached)}" for name in unknown]
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
    with record.route.block(rows):
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


@torch.no_grad()
def _mixing_layers(model: nn.Module) -> list[str]:
    """Adapted layers whose input does not begin with the rows of the batch (time-first models, experts that see the tokens
    sorted), found by passing two rows through the base, in both orders. Nothing is found for a model that
    does not say what inputs it takes."""
    owner: Any = owner_of(model)
    inputs = _two_rows(owner)
    if inputs is None:
        return []
    seen: list[dict[str, Tensor]] = []
    with evaluating(owner), record_of(model).route.block(None):
        for both in (inputs, {key: value.flip(0) for key, value in inputs.items()}):
            seen.append({})
            if not _noted(owner, both, seen[-1]):
                return []
    return [
        f"{name}: its input is {tuple(x.shape)} for a batch of 2"
        for name, x in seen[0].items()
        if not _swapped(x, seen[1].get(name))
    ]


def _two_rows(model: Any) -> dict[str, Tensor] | None:
    """The inputs that transformers keeps for trying a model of this class out, two rows of them."""
    try:
        device = next(model.parameters()).device
        return {key: value[:2].to(device) for key, value in model.dummy_inputs.items() if value.shape[0] >= 2}
    except (AttributeError, TypeError, StopIteration):
        return None


def _noted(model: Any, inputs: dict[str, Tensor], seen: dict[str, Tensor]) -> bool:
    """Whether the model takes these inputs; what its adapted layers are then given."""
    here = threading.get_ident()

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and threading.get_ident() == here:  # other threads may be computing as well
                seen.setdefault(name, inputs[0])

        return hook

    hooks = [m.register_forward_pre_hook(note(n)) for n, m in base_modules(model) if slot_of(m) is not None]
    try:
        model(**inputs)
    except Exception:  # whatever a model raises: it does not take them
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


def _swapped(x: Tensor, other: Tensor | None) -> bool:
    """Whether `other` is `x` with the two rows of the batch in the other order."""
    if other is None or x.shape != other.shape or x.dim() < 2 or x.shape[0] % 2:
        return False
    x, other = x.float(), other.float()
    halves = x.reshape(2, -1), other.reshape(2, -1).flip(0)
    return torch.allclose(*halves, rtol=1e-2, atol=1e-3 * float(x.abs().max().clamp_min(1e-12)))
