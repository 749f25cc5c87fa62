"""Attach and detach: with merged.py the only code that edits a model. Knows no files and no methods by name.

A model with adapters carries one `Adapters` record at its root: the route that its adapted layers share, what each
adapter put where, what was trainable before, and while an adapter is merged the original weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltaw.coverage import Coverage, coverage
from deltaw.errors import AdapterError, listing, nearest
from deltaw.layers import as_matrix, as_stored, in_few_bits, weights_of
from deltaw.lowrank import dense
from deltaw.originals import Original
from deltaw.outside import read_outside
from deltaw.reached import uncalled
from deltaw.residency import Residency
from deltaw.routes import Route
from deltaw.rows import Rows
from deltaw.slots import Slot, close_slot, open_slot, slot_of
from deltaw.updates import LowRank, Update

log = logging.getLogger("deltaw")

RECORD = "_deltaw"


@dataclass(frozen=True)
class Plan:
    """What a method wants done to a model, as data: nothing has been changed yet."""

    updates: Mapping[str, Update]
    """Layer name → its update."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Layer name → why this dense weight takes no update."""
    layers: Mapping[str, nn.Module] | None = None
    """All of the model's layers by name, where that each update fits its own has been looked at."""


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
    merged: dict[str, float] = field(default_factory=dict)
    """The adapters that are merged into the base, and their weights."""
    originals: dict[str, Original] = field(default_factory=dict)
    """While merged: name of a parameter → what gives it back."""
    before_merge: str | None = None
    residency: Residency = field(default_factory=Residency)
    rows_mixed: list[str] | None = None
    """Layers in which the rows of a batch cannot be told apart, once somebody asked; None: not known."""


class Names(tuple[str, ...]):
    """Names of the attached adapters in order; `.active` is the one in use, or None."""

    active: str | None = None

    def __repr__(self) -> str:
        return "(" + ", ".join(f"{n!r}*" if n == self.active else repr(n) for n in self) + ")"


# --- attach and detach ------------------------------------------------------------------------------------------


def attach(model: nn.Module, method: Method, *, name: str = "default") -> nn.Module:
    """Put a new adapter on `model`, make it active and trainable, and freeze the base. Returns the same object. Which layers take
    an update is logged at INFO, and is in `summary(model)`.

    Raises AdapterError when the name is taken or an adapter is merged, and whatever `method.plan` finds wrong; the
    model is then as it was.
    """
    check_free(model, name)
    plan = method.plan(owner_of(model))
    apply_plan(model, plan, method, name=name)
    for parameter in parameters(model, name):
        parameter.requires_grad_(True)
    _warn_of_stopped_gradients(model, plan.updates)
    if log.isEnabledFor(logging.INFO) and (lines := coverage_of(model, name).lines()):
        log.info("Adapter %r: %s", name, " ".join(lines))
    return model


def coverage_of(model: nn.Module, name: str) -> Coverage:
    """Which dense layers of the model this adapter changes, and why it leaves the others out."""
    return coverage(dict(base_modules(model)), updates(model, name), record_of(model).attached[name].left_out)


def _warn_of_stopped_gradients(model: nn.Module, updates: Mapping[str, Update]) -> None:
    """The input of a layer with a low-rank update gets its gradient whatever a package does; elsewhere that is the package's."""
    stopping = [
        name
        for name, layer in base_modules(model)
        if not isinstance(updates.get(name), LowRank)
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
            raise AdapterError(listing(f"Adapter {name!r} does not fit this model:", problems))
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
            record.rows_mixed = None
        for parameter in update.parameters():
            parameter.requires_grad_(False)
        update.training = layer.training
        slot.put(name, update)
    record.attached[name] = Attached(method, tuple(plan.updates), plan.left_out, metadata or {})
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
        record.route.stacks = {}
        if record.before_merge == adapter:
            record.before_merge = None
    if not record.attached:
        delattr(owner, RECORD)
        for parameter_name, parameter in owner.named_parameters():
            parameter.requires_grad_(record.was_trainable.get(parameter_name, parameter.requires_grad))
    return model


# --- merged weights ---------------------------------------------------------------------------------------------


def restore(model: nn.Module) -> None:
    """Original bits for every merged weight, if there is any, and the adapter active again that was so before."""
    record = record_of(model)
    put_back(model, record.originals)
    record.originals, record.merged = {}, {}
    record.route.active, record.before_merge = record.before_merge, None


@torch.no_grad()
def put_back(model: nn.Module, originals: Mapping[str, Original]) -> None:
    """Give these parameters the values from before a merge."""
    for name, original in originals.items():
        W = matrix_of(owner_of(model), name)
        W.copy_(original.restored(W))


def matrix_of(owner: nn.Module, name: str) -> Tensor:
    """A parameter by its dotted name, as the matrix that merges work on: a view of it. What is kept in few bits cannot be merged
    into; of that it is what the bits stand for."""
    layer, own_name = place_of(owner, name)
    if form := in_few_bits(layer, own_name):
        return form.dense(layer, torch.float32)
    parameter = layer._parameters[own_name]
    assert parameter is not None
    return as_matrix(layer, own_name, parameter.detach())


def place_of(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter of this dotted name, and its own name for it."""
    layer_name, _, own_name = name.rpartition(".")
    return owner.get_submodule(layer_name), own_name


# --- look -------------------------------------------------------------------------------------------------------


def adapters(model: nn.Module) -> Names:
    """Names of the attached adapters; `.active` says which this thread is in: None for the base, and where rows have adapters
    of their own. Empty for a model without any."""
    record = find_record(model)
    names = Names(record.attached if record else ())
    chosen = record.route.chosen() if record else None
    names.active = None if isinstance(chosen, Rows) else chosen
    return names


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The adapter's parameters, A and B of each layer in order, for any optimizer; one that layers share is there once. None
    means the active adapter."""
    found = {id(p): p for update in updates(model, name).values() for p in update.parameters()}
    return list(found.values())


def updates(model: nn.Module, name: str | None = None) -> dict[str, Update]:
    """Layer name → the adapter's update there, its tensors on its layers' device. None means the active adapter."""
    record = record_of(model)
    name = in_use(record) if name is None else known(record, name)
    bring(record, [name])
    owner = owner_of(model)
    found = {}
    for layer_name in record.attached[name].layers:
        slot = slot_of(owner.get_submodule(layer_name))
        assert slot is not None
        found[layer_name] = slot.get(name)
    return found


def delta(model: nn.Module, layer: str, name: str | None = None) -> Tensor:
    """ΔW of one layer: fp32 [d, k], by the arithmetic that merges use; of a stack of matrices in its own shape. None means the
    active adapter. Raises AdapterError where the adapter has no update on the layer's weight."""
    found = updates(model, name)
    module, _, own = (layer, "", "weight") if layer in found else layer.rpartition(".")
    if module not in found:
        raise AdapterError(f"The adapter has no update on {layer!r}{nearest(layer, found)}.")
    at = owner_of(model).get_submodule(module)
    change = found[module].changes(at).get(own)
    if change is None:
        raise AdapterError(f"The adapter leaves the weight of {layer!r} as it is.")
    dW = dense(change, _before_merge(model, dotted(module, own)))
    return as_stored(at, own, dW) if own in weights_of(at) else dW


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the base as it was before attach, original weights where an adapter is merged."""
    return ((name, tensor.detach()) for name, _, tensor in base_tensors(model))


def base_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """(name, parameter, what it was before attach: itself, if it is not merged) of the base."""
    record = find_record(model)
    merged = record.originals if record else {}
    for name, parameter in named_parameters(model):
        if name in merged:
            yield name, parameter, as_stored(*place_of(owner_of(model), name), _before_merge(model, name))
        else:
            yield name, parameter, parameter


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the base as it is, a tied one by its first name."""
    return ((names[0], parameter) for parameter, names in readers(model).items())


def readers(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Each parameter of the base → its names, of which a tied one has several."""
    found: dict[nn.Parameter, list[str]] = {}
    for module_name, module in base_modules(model):
        for own_name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append(dotted(module_name, own_name))
    return found


def dotted(module_name: str, own_name: str) -> str:
    """The full name of a module's parameter."""
    return f"{module_name}.{own_name}" if module_name else own_name


def _before_merge(model: nn.Module, name: str) -> Tensor:
    """A parameter as a matrix, as it was before a merge."""
    W = matrix_of(owner_of(model), name)
    original = record_of(model).originals.get(name)
    return W if original is None else original.restored(W)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the base in its own order, each module once; not the adapters', whose number may be large."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", owner_of(model))]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        children = [(f"{name}.{own}" if name else own, child) for own, child in module._modules.items()]
        waiting += [(n, c) for n, c in reversed(children) if c is not None and not isinstance(c, Slot)]


def names_of(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Name of each module that its model has under several names (`self.b = self.a`) → all names by which code may call it."""
    known = {id(module): name for name, module in modules.items()}
    names: dict[str, list[str]] = {}
    for place, parent in modules.items():
        for own, child in parent._modules.items():
            if id(child) in known:
                names.setdefault(known[id(child)], []).append(dotted(place, own))
    several = {name: others for name, others in names.items() if len(others) > 1}
    silent = uncalled(modules, [n for others in several.values() for n in others]) if several else set()
    called = {name: [n for n in others if n not in silent] for name, others in several.items()}
    return {name: others for name, others in called.items() if len(others) > 1}


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


def in_use(record: Adapters) -> str:
    """The one adapter that this thread goes through. Raises AdapterError."""
    chosen = record.route.chosen()
    if isinstance(chosen, Rows):
        raise AdapterError("Rows have adapters of their own in this route block: name the adapter that is meant.")
    if chosen is None:
        raise AdapterError(f"No adapter is active: name one. Attached: {', '.join(record.attached)}.")
    return str(chosen)


def bring(record: Adapters, names: Iterable[str | None]) -> None:
    """See to it that these adapters are on their layers' device."""
    record.residency.bring(names, {*record.route.held(), record.route.active} if record.residency.kept else ())


def in_open_block(record: Adapters, names: Iterable[str]) -> str | None:
    """For messages: that one of these adapters is in use by an open `using` or `route` block of any thread, if one is."""
    held = record.route.held().intersection(names)
    return f"Adapter {min(held)!r} is in use by an open using or route block" if held else None


def merged_names(record: Adapters) -> str:
    """ "Adapter 'a' is" or "Adapters 'a', 'b' are", for messages."""
    names = ", ".join(repr(name) for name in record.merged)
    return f"Adapter {names} is" if len(record.merged) == 1 else f"Adapters {names} are"


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
        raise AdapterError(f"{merged_names(record)} merged into the base: call unmerge(model) first.")
