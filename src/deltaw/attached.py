"""Attach, detach and switch: with merged.py the only code that edits a model. Knows no files and no methods by name.

A model with adapters carries one `Adapters` record at its root: the route that its adapted layers share, what each
adapter put where, what was trainable before, and while an adapter is merged the original weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError, listing, nearest
from deltaw.layers import LowRank, Route, close_slot, open_slot, shape, slot_of, why_not

RECORD = "_deltaw"


@dataclass(frozen=True)
class Plan:
    """What a method wants done to a model, as data: nothing has been changed yet."""

    updates: dict[str, LowRank]
    """Layer name → its update."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Layer name → why this dense weight takes no update."""


class Method(Protocol):
    """What a method's config must be able to do. `LoRA` is one."""

    def plan(self, model: nn.Module) -> Plan:
        """The updates for this model. Raises TargetError or ConfigError; changes nothing."""
        ...


@dataclass
class Attached:
    """One adapter on a model."""

    method: Any
    layers: tuple[str, ...]
    left_out: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Adapters:
    """All that deltaw keeps about a model. It is copied with the model by `copy.deepcopy`."""

    route: Route = field(default_factory=Route)
    attached: dict[str, Attached] = field(default_factory=dict)
    was_trainable: dict[str, bool] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    """While merged: layer name → its weight before."""
    before_merge: str | None = None
    fingerprint: Any = None
    """The base's fingerprint once somebody asked for it, and a stamp of the tensors that it was taken of."""


@dataclass(frozen=True)
class AdapterSummary:
    """Size of one adapter."""

    layers: int
    parameters: int
    share: float
    """Of the base's parameters."""
    bytes: int
    left_out: dict[str, str]
    """Dense weights without an update, and why."""


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: the base's size and each adapter's."""

    base_parameters: int
    base_bytes: int
    active: str | None
    adapters: dict[str, AdapterSummary]


class Names(tuple[str, ...]):
    """Names of the attached adapters in order; `.active` is the one in use, or None."""

    active: str | None = None

    def __repr__(self) -> str:
        return "(" + ", ".join(f"{n!r}*" if n == self.active else repr(n) for n in self) + ")"


# --- attach and detach ------------------------------------------------------------------------------------------


def attach(model: nn.Module, method: Method, *, name: str = "default") -> nn.Module:
    """Put a new adapter on `model`, make it active and trainable, and freeze the base. Returns the same object.

    Raises AdapterError when the name is taken or an adapter is merged, and whatever `method.plan` finds wrong; the
    model is then as it was.
    """
    check_free(model, name)
    plan = method.plan(owner_of(model))
    apply_plan(model, plan, method, name=name)
    for parameter in parameters(model, name):
        parameter.requires_grad_(True)
    return model


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
    layers = {n: model.get_submodule(n) for n in plan.updates}
    problems = [f"{n}: {why}" for n, layer in layers.items() if (why := why_not(layer))]
    problems += [
        f"{n}: the update is {u.B.shape[0]}×{u.A.shape[1]}, the layer {shape(layers[n])[0]}×{shape(layers[n])[1]}"
        for n, u in plan.updates.items()
        if not why_not(layers[n]) and (u.B.shape[0], u.A.shape[1]) != shape(layers[n])
    ]
    if problems:
        raise AdapterError(listing(f"Adapter {name!r} does not fit this model:", problems))
    if fresh:
        record.was_trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        setattr(model, RECORD, record)
    for layer_name, update in plan.updates.items():
        layer = layers[layer_name]
        slot = slot_of(layer) or open_slot(layer, record.route)
        update.requires_grad_(False).train(layer.training)
        slot.put(name, update)
    record.attached[name] = Attached(method, tuple(plan.updates), plan.left_out, metadata or {})
    if activate:
        record.route.active = name


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
        if record.route.active == adapter:
            record.route.active = None
        if record.before_merge == adapter:
            record.before_merge = None
    if not record.attached:
        delattr(owner, RECORD)
        for parameter_name, parameter in owner.named_parameters():
            parameter.requires_grad_(record.was_trainable.get(parameter_name, parameter.requires_grad))
    return model


# --- switch -----------------------------------------------------------------------------------------------------


def use(model: nn.Module, name: str | None) -> None:
    """Make another attached adapter active; None is the base. One write, whatever the number of layers and adapters."""
    record = record_of(model)
    if name is not None:
        known(record, name)
    if record.merged and name is not None:
        raise AdapterError(
            f"Adapter {record.merged[0]!r} is merged into the base: call unmerge(model) before use({name!r})."
        )
    record.route.active = name


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """`use` for the length of a with-block; the adapter active before comes back, also after an error."""
    record = record_of(model)
    before = record.route.active
    use(model, name)
    try:
        yield
    finally:
        record.route.active = before


def restore(model: nn.Module) -> None:
    """Original bits for every merged weight, if there is any, and the adapter active again that was so before."""
    record = record_of(model)
    put_back(model, record.originals)
    record.originals, record.merged = {}, ()
    record.route.active, record.before_merge = record.before_merge, None


def put_back(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Copy weights from before a merge over their layers': layer name → weight."""
    with torch.no_grad():
        for layer_name, W0 in originals.items():
            layer: Any = owner_of(model).get_submodule(layer_name)
            layer.weight.copy_(W0)


# --- look -------------------------------------------------------------------------------------------------------


def adapters(model: nn.Module) -> Names:
    """Names of the attached adapters; `.active` says which is in use. Empty for a model without any."""
    record = find_record(model)
    names = Names(record.attached if record else ())
    names.active = record.route.active if record else None
    return names


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The adapter's parameters, A and B of each layer in order, for any optimizer. None means the active adapter."""
    return [p for update in updates(model, name).values() for p in update.parameters()]


def updates(model: nn.Module, name: str | None = None) -> dict[str, LowRank]:
    """Layer name → the adapter's update there. None means the active adapter."""
    record = record_of(model)
    name = record.route.active if name is None else known(record, name)
    if name is None:
        raise AdapterError(f"No adapter is active. Attached: {', '.join(record.attached)}.")
    owner = owner_of(model)
    found = {}
    for layer_name in record.attached[name].layers:
        slot = slot_of(owner.get_submodule(layer_name))
        assert slot is not None
        found[layer_name] = slot.get(name)
    return found


def delta(model: nn.Module, layer: str, name: str | None = None) -> Tensor:
    """ΔW of one layer: fp32 [d, k], by the arithmetic that merges use. None means the active adapter."""
    found = updates(model, name)
    if layer not in found:
        raise AdapterError(f"The adapter has no update on {layer!r}{nearest(layer, found)}.")
    return found[layer].delta()


def summary(model: nn.Module) -> Summary:
    """Sizes of the base and of each attached adapter."""
    base = dict(base_parameters(model))
    count = sum(p.numel() for p in base.values())
    each = {}
    for name in adapters(model):
        own = parameters(model, name)
        size = sum(p.numel() for p in own)
        attached = record_of(model).attached[name]
        each[name] = AdapterSummary(
            layers=len(attached.layers),
            parameters=size,
            share=size / count,
            bytes=sum(p.numel() * p.element_size() for p in own),
            left_out=dict(attached.left_out),
        )
    return Summary(count, sum(p.numel() * p.element_size() for p in base.values()), adapters(model).active, each)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the base as it was before attach, original weights where an adapter is merged."""
    record = find_record(model)
    originals = {f"{n}.weight": w for n, w in record.originals.items()} if record else {}
    ours = {id(p) for name in adapters(model) for p in parameters(model, name)}
    for parameter_name, parameter in owner_of(model).named_parameters():
        if id(parameter) not in ours:
            yield parameter_name, originals.get(parameter_name, parameter.detach())


# --- the record -------------------------------------------------------------------------------------------------


def find_record(model: nn.Module) -> Adapters | None:
    """The model's record, also through a wrapper (DDP, torch.compile); None when no adapter is attached."""
    owner = owner_of(model)
    return owner.__dict__.get(RECORD)


def owner_of(model: nn.Module) -> nn.Module:
    """The module whose dotted names are the base's own and that holds the record: what a wrapper (torch.compile, DataParallel,
    DDP) wraps; else the part of the model that has a record; else the model."""
    while (wrapped := _wrapped(model)) is not None:
        model = wrapped
    return next((m for m in model.modules() if RECORD in m.__dict__), model)


def _wrapped(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    return model._modules.get("_orig_mod")  # torch.compile's, whose class is private


def record_of(model: nn.Module) -> Adapters:
    record = find_record(model)
    if record is None:
        raise AdapterError("The model has no adapter: attach or load one first.")
    return record


def known(record: Adapters, name: str) -> str:
    if name not in record.attached:
        raise AdapterError(
            f"There is no adapter {name!r}{nearest(name, record.attached)}. Attached: {', '.join(record.attached)}."
        )
    return name


def check_free(model: nn.Module, name: str) -> None:
    """Raise AdapterError unless an adapter of this name can be attached now."""
    record = find_record(model) or Adapters()
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"{name!r} cannot name an adapter: a name is a non-empty string without dots.")
    if name in record.attached:
        raise AdapterError(
            f"An adapter {name!r} is attached already. Choose another name, or detach(model, {name!r}) first."
        )
    if record.merged:
        raise AdapterError(f"Adapter {record.merged[0]!r} is merged into the base: call unmerge(model) first.")
