"""Attach, detach, switch, merge, unmerge: the only code that edits a model. Knows no files and no methods by name.

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

from deltaw.errors import AdapterError, MergeError, listing, nearest
from deltaw.layers import LowRank, Route, close_slot, open_slot, shape, slot_of, why_not
from deltaw.lowrank import MergeStats, merge_

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
    """The base's fingerprint once somebody asked for it; kept because the base cannot change."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, per layer."""

    adapters: tuple[str, ...]
    layers: dict[str, MergeStats]

    @property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W0‖ over all merged layers together."""
        total = sum(s.w0_norm**2 for s in self.layers.values())
        return (sum(s.dw_norm**2 for s in self.layers.values()) / total) ** 0.5 if total else 0.0

    @property
    def survived(self) -> float:
        """Share of ΔW that the rounding to the weights' dtype kept, weighted by ‖ΔW‖²."""
        total = sum(s.dw_norm**2 for s in self.layers.values())
        return sum(s.survived * s.dw_norm**2 for s in self.layers.values()) / total if total else 1.0

    @property
    def largest_change(self) -> float:
        """The largest |W'−W0| of any entry."""
        return max((s.largest_change for s in self.layers.values()), default=0.0)


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
    plan = method.plan(model)
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
    record = find_record(model)
    fresh = record is None
    record = record or Adapters()
    check_free(model, name)
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
    owner = _owner(model)
    gone = list(record.attached) if name is None else [_known(record, name)]
    if any(n in record.merged for n in gone):
        unmerge(model)
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
    record = _record(model)
    if name is not None:
        _known(record, name)
    if record.merged and name is not None:
        raise AdapterError(
            f"Adapter {record.merged[0]!r} is merged into the base: call unmerge(model) before use({name!r})."
        )
    record.route.active = name


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """`use` for the length of a with-block; the adapter active before comes back, also after an error."""
    record = _record(model)
    before = record.route.active
    use(model, name)
    try:
        yield
    finally:
        record.route.active = before


# --- merge and unmerge ------------------------------------------------------------------------------------------


def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    allow_unchanged: bool = False,
) -> MergeReport:
    """Fold ΔW into W0 so that inference costs nothing extra; `unmerge` gives W0 back bit for bit.

    `name` is the adapter (default: the active one); `weights` merges several instead, each ΔW times its weight, in
    the order given. A copy of each targeted weight is kept until `unmerge`. While merged the branch is off.

    Raises MergeError, with the model as it was, when something is merged already, when a targeted weight is tied to
    another layer that would change too, or when a targeted weight would come out unchanged (its ΔW is zero or was
    rounded away: the "merged model equals the base" trap) unless `allow_unchanged`.
    """
    record = _record(model)
    if record.merged:
        raise MergeError(f"Adapter {record.merged[0]!r} is merged already: call unmerge(model) first.")
    if weights is None:
        name = record.route.active if name is None else name
        if name is None:
            raise MergeError(f"No adapter is active: name the one to merge. Attached: {', '.join(record.attached)}.")
        weights = {name: 1.0}
    elif name is not None:
        raise MergeError("Give either a name or weights, not both.")
    if not weights:
        raise MergeError("weights is empty: name at least one adapter.")
    terms = _merge_terms(model, record, weights)
    _check_ties(model, terms)
    stats: dict[str, MergeStats] = {}
    originals: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for layer_name, updates in terms.items():
                layer: Any = _owner(model).get_submodule(layer_name)
                originals[layer_name] = layer.weight.detach().clone()
                A, B, scale = _stacked(updates)
                stats[layer_name] = merge_(updates[0][0].W0(layer).detach(), A, B, scale)
        _check_changed(stats, allow_unchanged)
    except BaseException:
        _restore(_owner(model), originals)
        raise
    record.merged, record.originals = tuple(weights), originals
    record.before_merge, record.route.active = record.route.active, None
    return MergeReport(tuple(weights), stats)


def unmerge(model: nn.Module) -> None:
    """Give every merged weight its original bits back and make the adapter that was active before active again."""
    record = _record(model)
    if not record.merged:
        raise MergeError("Nothing is merged.")
    _restore(_owner(model), record.originals)
    record.originals, record.merged = {}, ()
    record.route.active, record.before_merge = record.before_merge, None


def _merge_terms(
    model: nn.Module, record: Adapters, weights: Mapping[str, float]
) -> dict[str, list[tuple[LowRank, float]]]:
    """Layer name → the updates to sum there, each with its weight."""
    terms: dict[str, list[tuple[LowRank, float]]] = {}
    for adapter, weight in weights.items():
        for layer_name, update in updates(model, _known(record, adapter)).items():
            terms.setdefault(layer_name, []).append((update, float(weight)))
    return terms


def _stacked(terms: list[tuple[LowRank, float]]) -> tuple[Tensor, Tensor, float]:
    """One (A, B, scale) whose ΔW is the weighted sum: ranks add up. A single one at weight 1 stays as it is."""
    if len(terms) == 1:
        update, weight = terms[0]
        return update.A, update.B, update.scale * weight
    A = torch.cat([u.A.detach().float() for u, _ in terms])
    B = torch.cat([u.B.detach().float() * (u.scale * w) for u, w in terms], dim=1)
    return A, B, 1.0


def _check_ties(model: nn.Module, terms: Mapping[str, Any]) -> None:
    """A weight that another layer reads too would change that layer as well."""
    owner = _owner(model)
    readers: dict[Tensor, list[str]] = {}
    for module_name, module in owner.named_modules():
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                readers.setdefault(parameter, []).append(f"{module_name}.{parameter_name}")
    problems = []
    for layer_name in terms:
        layer: Any = owner.get_submodule(layer_name)
        others = [r for r in readers[layer.weight] if r != f"{layer_name}.weight"]
        if others:
            problems.append(f"{layer_name}.weight is tied to {', '.join(others)}, which would change with it")
    if problems:
        raise MergeError(
            listing("This adapter cannot be merged as the model stands:", problems) + "\nUntie the weights first."
        )


def _check_changed(stats: Mapping[str, MergeStats], allow_unchanged: bool) -> None:
    same = [n for n, s in stats.items() if s.changed == 0.0]
    if same and not allow_unchanged:
        problems = [
            f"{n}: " + ("ΔW is zero (was it trained?)" if not stats[n].dw_norm else "its dtype rounds ΔW away")
            for n in same
        ]
        raise MergeError(
            listing(f"{len(same)} of {len(stats)} targeted weights would come out of the merge unchanged:", problems)
        )


def _restore(owner: nn.Module, originals: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for layer_name, W0 in originals.items():
            layer: Any = owner.get_submodule(layer_name)
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
    record = _record(model)
    name = record.route.active if name is None else _known(record, name)
    if name is None:
        raise AdapterError(f"No adapter is active. Attached: {', '.join(record.attached)}.")
    owner = _owner(model)
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
        attached = _record(model).attached[name]
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
    for parameter_name, parameter in _owner(model).named_parameters():
        if id(parameter) not in ours:
            yield parameter_name, originals.get(parameter_name, parameter.detach())


# --- the record -------------------------------------------------------------------------------------------------


def find_record(model: nn.Module) -> Adapters | None:
    """The model's record, also through a wrapper (DDP, torch.compile); None when no adapter is attached."""
    owner = _owner(model)
    return owner.__dict__.get(RECORD)


def _owner(model: nn.Module) -> nn.Module:
    """The module that holds the record: the model itself, else the one inside a wrapper, else the model."""
    if RECORD in model.__dict__:
        return model
    return next((m for m in model.modules() if RECORD in m.__dict__), model)


def _record(model: nn.Module) -> Adapters:
    record = find_record(model)
    if record is None:
        raise AdapterError("The model has no adapter: attach or load one first.")
    return record


def _known(record: Adapters, name: str) -> str:
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
