"""Attach and detach adapters: with model/merge.py the only code that edits a model. Knows no files and no methods by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from deltaw.errors import AdapterError
from deltaw.layers.kinds import in_few_bits
from deltaw.layers.patch import close_slot, open_slot, read_outside, slot_of
from deltaw.layers.tree import RECORD, base_modules, owner_of
from deltaw.methods.plan import Method, Plan
from deltaw.methods.updates.base import Update
from deltaw.model.passes import unwatch, watch
from deltaw.model.record import Adapters, Attached, check_free, find_record, in_open_block, known, restore
from deltaw.model.summary import coverage_of, parameters

log = logging.getLogger("deltaw")
coverage_log = logging.getLogger("deltaw.coverage")


def attach(model: nn.Module, method: Method, *, name: str = "default") -> nn.Module:
    """Put a new adapter on `model`, make it active and trainable, and freeze the base. Returns the same object. Which layers take
    an update is logged at INFO, and is in `summary(model)`.

    What a method starts from at random is drawn from torch's global generator on the CPU: `torch.manual_seed` decides it.

    Raises AdapterError when the name is taken or an adapter is merged, and whatever `method.plan` finds wrong; the
    model is then as it was.
    """
    check_free(model, name)
    plan = method.plan(owner_of(model))
    apply_plan(model, plan, method, name=name)
    for parameter in parameters(model, name):
        parameter.requires_grad_(True)
    _warn_of_stopped_gradients(model, plan.updates)
    _log_coverage(model, name)
    return model


def _log_coverage(model: nn.Module, name: str) -> None:
    """Say at INFO which layers take an update, but of a model without memory, on which steps are only planned."""
    planned = any(parameter.is_meta for parameter in parameters(model, name))
    if not planned and coverage_log.isEnabledFor(logging.INFO) and (lines := coverage_of(model, name).lines()):
        coverage_log.info("Adapter %r: %s", name, " ".join(lines))


def _warn_of_stopped_gradients(model: nn.Module, updates: Mapping[str, Update]) -> None:
    """The input of a layer with a low-rank update gets its gradient whatever a package does; elsewhere that is the package's."""
    stopping = [
        name
        for name, layer in base_modules(model)
        if not (name in updates and updates[name].low_rank())
        and (form := in_few_bits(layer, "weight"))
        and form.stops_gradients(layer)
    ]
    if stopping:
        log.warning(
            "%d quantised layers have no low-rank update (%s, say). The package that computes them gives gradients in some "
            "passes only on this device, and layers before them then learn nothing: LoRA(targets='all-linear') includes them.",
            len(stopping),
            stopping[0],
        )


def apply_plan(
    model: nn.Module,
    plan: Plan,
    method: Any,
    *,
    name: str,
    activate: bool = True,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Put a checked plan's updates on their layers, frozen. Everything that can fail is looked at before any change."""
    check_free(model, name)
    model = owner_of(model)
    record = find_record(model)
    fresh = record is None
    record = record or Adapters()
    layers = plan.layers
    if layers is None:
        layers = dict(base_modules(model))
        problems = [f"{n}: {why}" for n, update in plan.updates.items() if (why := update.misfit(layers[n]))]
        if problems:
            raise AdapterError(f"Adapter {name!r} does not fit this model:", problems)
    if fresh:
        record.was_trainable = {n: p.requires_grad for n, p in model.named_parameters()}
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


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter off, or all when `name` is None; with the last one gone the model is exactly as before attach:
    classes, keys, ties, bytes and which parameters train. A merged adapter is unmerged first. Returns the same object.
    """
    record = find_record(model)
    if record is None:
        if name is not None:
            raise AdapterError(f"There is no adapter {name!r}: the model has none.")
        return model
    owner = owner_of(model)
    gone = list(record.attached) if name is None else [known(record, name)]
    if busy := in_open_block(record, gone):
        raise AdapterError(f"{busy}: detach it when the block is over.")
    if any(n in record.merged for n in gone):
        restore(model)
    for adapter in gone:
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


def problems_of_weights(weights: Any) -> list[str]:
    """Say what is wrong with weights of adapters, which are finite numbers by name."""
    if not isinstance(weights, Mapping):
        return [f"weights is a {type(weights).__name__}; it must be a mapping of names to numbers"]
    problems = [] if weights else ["weights is empty: name at least one adapter"]
    for name, weight in weights.items():
        try:
            if not math.isfinite(weight):
                problems.append(f"the weight of {name!r} is {weight!r}, with which the sum would not be finite")
        except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers is none
            problems.append(f"the weight of {name!r} is {weight!r}; it must be a number")
    return problems
