"""The choice among attached adapters: `use` for a model, `using` for a with-block, `route` for each row of a batch.

`at_fault` tells by such a choice whether outputs that mean nothing come of the base or of an adapter.

Writes a model's route and nothing else; model/row_order.py finds where the rows of a batch lie.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError, ConfigError, DeltaWError, FileError, nearest
from deltaw.layers.ops.rows import Rows
from deltaw.layers.patch import slot_of
from deltaw.layers.tree import is_finite, not_finite_in, owner_of
from deltaw.model.record import Adapters, bring, find_record, known, merged_names, record_of
from deltaw.model.row_order import check_rows_apart, trying_new_forms


def use(model: nn.Module, name: str | None) -> None:
    """Make another attached adapter active. It is one write, whatever the number of layers and adapters.

    It holds for all code outside of `using` and `route` blocks. Within a block, or a call of `generate`, it holds for that
    alone. A pass that has begun goes on as it began.

    Args:
        model: The model with the adapters.
        name: The adapter, or None for the base alone.

    Raises:
        AdapterError: There is no such adapter, or one is merged.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4), name="a")
    >>> deltaw.use(model, None)
    >>> print(deltaw.adapters(model).active)
    None
    """
    record = record_of(model)
    _check(record, name)
    bring(record, [name])
    record.route.choose(name)


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """Make another attached adapter active for a with-block, and for the code in it alone.

    Other threads, tasks and generators go on as they were. Tasks that are spawned in the block, and `asyncio.to_thread`, are in
    it too. A plain `threading.Thread` is not, and opens a block of its own. A generator is in its block while it runs, its
    caller is not. One under `contextlib.contextmanager` hands the block on to the code that enters it.

    Args:
        model: The model with the adapters.
        name: The adapter, or None for the base alone.

    Raises:
        AdapterError: There is no such adapter, or one is merged. In a pass: a task or thread was started beside a generator
            that is paused in a block, so that it cannot be told whether it belongs to the block.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4), name="a")
    >>> with deltaw.using(model, None):
    ...     print(deltaw.adapters(model).active)
    None
    >>> deltaw.adapters(model).active
    'a'
    """
    record = _record_for_a_block(model)
    _check(record, name)
    bring(record, [name])
    with record.route.block(name):
        yield


@contextlib.contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Send each row of a batch through the adapter of its name for a with-block, all rows in one pass.

    The block holds for the same code as one of `using`. The batch has one row for each name, and `generate` gets one prompt for
    each. Of a prompt `generate` makes a fixed number of rows, one after the other, for beams and `num_return_sequences`.

    Ranks may differ; each row costs its own adapter's arithmetic. A pass stacks the adapters' tensors, which takes their bytes
    once more; `generate` stacks them once. Gradients reach each adapter's A and B.

    Args:
        model: The model with the adapters.
        names: For each row its adapter, or None for the base alone.

    Raises:
        AdapterError: Names are unknown (all are listed), or an adapter is merged; layers of the model do not keep the rows of a
            batch apart; or, in a pass, the batch has another number of rows.

    >>> import deltaw, torch
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4), name="a")
    >>> _ = deltaw.attach(model, deltaw.LoRA(rank=2), name="b")
    >>> with deltaw.route(model, ["a", None, "b"]):
    ...     logits = model(torch.tensor([[5, 6], [5, 6], [7, 8]])).logits
    >>> logits.shape[:2]
    torch.Size([3, 2])
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
        check_rows_apart(model, record)
    trying = contextlib.nullcontext() if rows.alike else trying_new_forms(model, record)
    with record.route.block(rows), trying:
        yield


def keep_on_device(model: nn.Module, most: int) -> None:
    """Set how many of the adapters that were loaded with `host=True` may be on their layers' device at once.

    Those that were used last stay there. While more are in use, all of these do. The number is 16 unless it is set.

    Args:
        model: The model with the adapters.
        most: The number, at least 1.

    Raises:
        ConfigError: `most` is less than 1.
        AdapterError: The model has no adapter.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4), name="a")
    >>> path = deltaw.save(model, "a", name="a")
    >>> _ = deltaw.load(model, path, name="b", host=True)
    >>> deltaw.keep_on_device(model, 1)
    """
    if most < 1:
        raise ConfigError(f"most is {most}; at least one adapter must be on the device to be used.")
    record = record_of(model)
    record.residency.most = most
    record.residency.bring([], {*record.route.held(), record.route.active})


def at_fault(
    model: nn.Module, again: Callable[[], Tensor], *, name: str = "", sound: Callable[[Tensor], bool] = is_finite
) -> DeltaWError:
    """Return the error for outputs that mean nothing, which says whether the base makes them or an adapter.

    Args:
        model: The model, with the adapters in use.
        again: Computes the outputs once more; it is called with the base alone.
        name: The base, for messages.
        sound: Tells outputs that mean something.
    """
    record = find_record(model)
    if record is not None and record.merged:
        return AdapterError(
            f"The outputs of the model with {merged_names(record)} merged are {_NOTHING}. {_NARROW} If that changes nothing, "
            "call unmerge(model) and look at base and adapter one by one."
        )
    used = [] if record is None else _used(record)
    if record is None or not used:
        return base_not_finite(model, name)
    with torch.no_grad(), using(model, None):
        if not sound(again()):
            return base_not_finite(model, name)
    return AdapterError(
        f"With the adapter {' or '.join(map(repr, used))} the outputs are {_NOTHING}; the base alone is sound.",
        [line for adapter in used for line in _largest(owner_of(model), record, adapter)],
        f"{_NARROW} If that changes nothing, its training went wrong: train it again with a smaller learning rate.",
    )


def base_not_finite(model: nn.Module, name: str = "") -> FileError:
    """Return the error for a base whose own outputs are not finite, with the tensors that are to blame for it."""
    name, dtype = (
        name or "the base",
        next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
    )
    if broken := not_finite_in(model):
        return FileError(
            f"{name} is damaged: {len(broken)} of its tensors hold NaN or infinity, and so would every output:", broken,
            "Download or convert it anew.",
        )  # fmt: skip
    return FileError(
        f"The outputs of {name} are {_NOTHING}, without any adapter. Its weights are finite, but too large for "
        f"{str(dtype).removeprefix('torch.')}. {_NARROW}"
    )


_NOTHING = "not finite (NaN or infinity), or all equal as after an overflow"
_NARROW = "Try --dtype float32, in Python dtype=torch.float32."


def _used(record: Adapters) -> list[str]:
    """Return the adapters that passes go through now."""
    choice, _ = record.route.taken()
    names = choice.names if isinstance(choice, Rows) else [choice]
    return [name for name in dict.fromkeys(names) if isinstance(name, str)]


def _largest(owner: nn.Module, record: Adapters, name: str) -> list[str]:
    """Return lines on the layers of an adapter with the largest entries, where these are far beyond those of a weight."""
    sizes = {
        layer: max((float(p.detach().abs().max()) for p in slot.get(name).parameters() if p.numel()), default=0.0)
        for layer in record.attached[name].layers
        if (slot := slot_of(owner.get_submodule(layer))) is not None
    }
    large = sorted((layer for layer in sizes if not sizes[layer] < _LARGE), key=lambda layer: -sizes[layer])
    return [f"{name}: {layer} has entries of {sizes[layer]:.3g}" for layer in large[:3]]


_LARGE = 1e4


def _check(record: Adapters, name: str | None) -> None:
    """Raise AdapterError unless this adapter, or the base for None, can be used now."""
    if name is None:
        return
    known(record, name)
    if record.merged:
        raise AdapterError(f"{merged_names(record)} merged into the base: call unmerge(model) before {name!r} is used.")


def _record_for_a_block(model: nn.Module) -> Adapters:
    """Return the model's record. Raises AdapterError for nn.DataParallel."""
    if isinstance(model, nn.DataParallel):
        raise AdapterError(
            "DataParallel computes in threads of its own, which see no block of this one: switch by use(model, name)."
        )
    return record_of(model)
