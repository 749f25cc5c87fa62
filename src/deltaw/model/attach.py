"""Attach and detach adapters: with model/merging/ the only code that edits a model. Knows no files and no methods by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from deltaw.errors import AdapterError
from deltaw.layers.kinds import in_few_bits
from deltaw.layers.patch import close_slot, open_slot, slot_of
from deltaw.layers.processes.shards import is_dealt
from deltaw.layers.source import read_outside
from deltaw.layers.tree import RECORD, base_modules, owner_of
from deltaw.methods.plan import Method, Plan
from deltaw.methods.updates.base import Update
from deltaw.model.merging.kept import restore
from deltaw.model.passes import unwatch, watch
from deltaw.model.record import Adapters, Attached, Notes, check_free, find_record, in_open_block, known
from deltaw.model.summary import coverage_of, parameters

log = logging.getLogger("deltaw")
coverage_log = logging.getLogger("deltaw.coverage")

_Model = TypeVar("_Model", bound=nn.Module)


def attach(model: _Model, method: Method, *, name: str = "default") -> _Model:
    """Put a new adapter on `model`, make it active and trainable, and freeze the base.

    Which layers take an update is logged at INFO, and is in `summary(model)`. Random starts are drawn from torch's global
    generator on the CPU, so `torch.manual_seed` decides them.

    Args:
        model: Any module with dense layers. It is changed in place.
        method: The settings of a method: `LoRA`, `DoRA`, `IA3`, `BitFit`, `Bottleneck`, `Prefix` or `Full`.
        name: The adapter's name, a non-empty string without dots.

    Returns:
        The same object as `model`.

    Raises:
        AdapterError: The name is taken or no name, an adapter is merged, or `fully_shard` was called before.
        TargetError: The method's targets match nothing, or a layer that cannot take its update.
        ConfigError: A setting of the method does not fit the model. After any error the model is as it was.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("model")
    >>> deltaw.attach(model, deltaw.LoRA(rank=4, targets="qv")) is model
    True
    >>> [name for name, p in model.named_parameters() if p.requires_grad][0]
    'model.layers.0.self_attn.q_proj.deltaw.default.A'
    """
    check_free(model, name)
    if is_dealt(model):
        raise AdapterError(
            "The model's weights are dealt out over processes (fully_shard) already: attach first, then call fully_shard, so "
            "that the adapter's gradients are summed over the processes too."
        )
    plan = method.plan(owner_of(model))
    apply_plan(model, plan, method, name=name)
    for parameter in parameters(model, name):
        parameter.requires_grad_(True)
    _warn_of_stopped_gradients(model, plan.updates)
    _log_coverage(model, name)
    return model


def _log_coverage(model: nn.Module, name: str) -> None:
    """Log at INFO which layers take an update, except on the meta device, where steps are only planned."""
    planned = any(parameter.is_meta for parameter in parameters(model, name))
    if not planned and coverage_log.isEnabledFor(logging.INFO) and (lines := coverage_of(model, name).lines()):
        coverage_log.info("Adapter %r: %s", name, " ".join(lines))


def _warn_of_stopped_gradients(model: nn.Module, updates: Mapping[str, Update]) -> None:
    """Warn of quantised layers through which no gradient may flow.

    A low-rank update passes its layer's input the gradient itself; without one, whether it flows is up to the package.
    """
    stopping = [
        name
        for name, layer in base_modules(model)
        if not (name in updates and updates[name].low_rank())
        and (form := in_few_bits(layer, "weight"))
        and form.stops_gradients(layer)
    ]
    if stopping:
        log.warning(
            "%d quantised layers have no low-rank update (%s, for example). The package that computes them gives gradients in "
            "some passes only on this device, and layers before them then learn nothing. The targets all-linear include them.",
            len(stopping),
            stopping[0],
        )


def apply_plan(
    model: nn.Module,
    plan: Plan,
    method: Method,
    *,
    name: str,
    activate: bool = True,
    metadata: Notes | None = None,
) -> None:
    """Put a plan's updates on their layers, frozen.

    Everything that can fail is checked before any change. Raises AdapterError for a name that is taken, or for updates that do
    not fit their layers.
    """
    check_free(model, name)
    model = owner_of(model)
    record = find_record(model)
    layers = plan.layers
    if layers is None:
        layers = dict(base_modules(model))
        problems = [f"{n}: {why}" for n, update in plan.updates.items() if (why := update.misfit(layers[n]))]
        if problems:
            raise AdapterError(f"Adapter {name!r} does not fit this model:", problems)
    if record is None:
        record = Adapters(was_trainable={n: p.requires_grad for n, p in model.named_parameters()})
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        setattr(model, RECORD, record)
    for layer_name, update in plan.updates.items():
        layer = layers[layer_name]
        slot = slot_of(layer)
        if slot is None:
            place, _, own_name = layer_name.rpartition(".")
            slot = open_slot(layer, record.route, read=read_outside(model.get_submodule(place), own_name))
            slot.name = layer_name
            record.rows_mixed = None
            record.rows_reached.clear()
            record.rows_asked.clear()
        for parameter in update.parameters():
            parameter.requires_grad_(False)
        update.training = layer.training
        slot.put(name, update)
    record.attached[name] = Attached(method, tuple(plan.updates), plan.left_out, metadata or {})
    record.hooks += watch(model, record)
    if activate:
        record.route.choose(name)


def detach(model: _Model, name: str | None = None) -> _Model:
    """Take one adapter off, or all.

    Without its last adapter the model is exactly as before the first attach: classes, keys, ties, bytes, and which parameters
    train. A merged adapter is unmerged first.

    Args:
        model: The model. It is changed in place.
        name: The adapter, or None for all.

    Returns:
        The same object as `model`.

    Raises:
        AdapterError: There is no such adapter, or an open `using` or `route` block or a pass uses it.
        MergeError: It is merged, and merged weights were changed since (see `unmerge`).

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("model")
    >>> keys = list(model.state_dict())
    >>> _ = deltaw.attach(model, deltaw.LoRA(rank=4))
    >>> list(deltaw.detach(model).state_dict()) == keys
    True
    """
    record = find_record(model)
    if record is None:
        if name is not None:
            raise AdapterError(f"There is no adapter {name!r}: the model has none.")
        return model
    owner = owner_of(model)
    leaving = list(record.attached) if name is None else [known(record, name)]
    if busy := in_open_block(record, leaving):
        raise AdapterError(f"{busy}: detach it when the block is over.")
    if any(n in record.merged for n in leaving):
        restore(model)
    for adapter in leaving:
        for layer_name in record.attached.pop(adapter).layers:
            layer = owner.get_submodule(layer_name)
            slot = slot_of(layer)
            assert slot is not None
            slot.drop(adapter)
            if not slot.names():
                close_slot(layer)
        record.residency.forget(adapter)
        if record.route.active == adapter:
            record.route.active = None
        if record.before_merge == adapter:
            record.before_merge = None
    if not record.attached:
        unwatch(owner, record.hooks)
        delattr(owner, RECORD)
        for parameter_name, parameter in owner.named_parameters():
            parameter.requires_grad_(record.was_trainable.get(parameter_name, parameter.requires_grad))
    return model
