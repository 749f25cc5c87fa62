"""A look at a model's adapters: their names, parameters, sizes and ΔW, and which dense layers they change. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from deltaw.errors import AdapterError, nearest
from deltaw.layers.kinds import QuantisedKind, as_stored, in_few_bits, weights_of
from deltaw.layers.names import by_family
from deltaw.layers.ops.merging import dense
from deltaw.layers.ops.rows import Rows
from deltaw.layers.patch import slot_of
from deltaw.layers.tree import base_modules, dotted, owner_of, place_of
from deltaw.methods.targets import WHERE_NAMED, left_out, role
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.lowrank import low_rank_parts
from deltaw.model.ends import taught
from deltaw.model.record import before_merge, bring, find_record, in_use, known, named_parameters, record_of


class Names(tuple[str, ...]):
    """Names of the attached adapters in order; `.active` is the one in use, or None."""

    active: str | None = None

    def __repr__(self) -> str:
        return "(" + ", ".join(f"{n!r}*" if n == self.active else repr(n) for n in self) + ")"


def coverage_of(model: nn.Module, name: str) -> Coverage:
    """Tell which dense layers of the model this adapter changes, and why it leaves the others out."""
    return coverage(dict(base_modules(model)), updates(model, name), record_of(model).attached[name].left_out)


# --- look -------------------------------------------------------------------------------------------------------


def adapters(model: nn.Module) -> Names:
    """Names of the attached adapters; `.active` says which this thread is in: None for the base, and where rows have adapters
    of their own. Empty for a model without any."""
    record = find_record(model)
    names = Names(record.attached if record else ())
    chosen = record.route.current() if record else None
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
    """ΔW of one layer: [d, k] in fp32, in float64 of a float64 weight, by the arithmetic that merges use; of a stack of
    matrices in its own shape. None means the active adapter. Raises AdapterError where the adapter has no update on the
    layer's weight."""
    found = updates(model, name)
    module, _, own = (layer, "", "weight") if layer in found else layer.rpartition(".")
    if module not in found:
        raise AdapterError(f"The adapter has no update on {layer!r}{nearest(layer, found)}.")
    at = owner_of(model).get_submodule(module)
    change = found[module].changes(at).get(own)
    if change is None:
        raise AdapterError(f"The adapter leaves the weight of {layer!r} as it is.")
    dW = dense(change, before_merge(model, dotted(module, own)))
    return as_stored(at, own, dW) if own in weights_of(at) else dW


@dataclass(frozen=True)
class AdapterSummary:
    """Size of one adapter."""

    layers: int
    """Modules that have an update: of a loaded adapter, those that its file reached."""
    parameters: int
    share: float
    """Of the base's parameters."""
    bytes: int
    coverage: Coverage
    """Which dense layers take an update, by role, and why the others do not."""
    zero: int = 0
    """How many low-rank updates have a B of zeros: they change nothing, as before the first step of a training."""
    rounding: float = 0.0
    """‖ΔW − ΔW'‖ / ‖ΔW‖ of an adapter that was loaded in less than its file's precision."""
    ends: tuple[int, ...] = ()
    """Ids of the tokens that end what it was taught to say."""

    @property
    def left_out(self) -> dict[str, str]:
        """Dense weights without an update, and why."""
        return self.coverage.left_out


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: the base's size and each adapter's."""

    base_parameters: int
    base_bytes: int
    active: str | None
    adapters: dict[str, AdapterSummary]


def summary(model: nn.Module) -> Summary:
    """Sizes of the base and of each attached adapter."""
    sizes = [_size(model, name, p) for name, p in named_parameters(model)]
    count = sum(n for n, _ in sizes)
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
            coverage=coverage_of(model, name),
            zero=sum(_is_zero(part.B.detach()) for part in low_rank_parts(updates(model, name))),
            rounding=attached.metadata.get("rounding", 0.0),
            ends=taught(model, [name]),
        )
    return Summary(count, sum(size for _, size in sizes), adapters(model).active, each)


def _is_zero(B: Tensor) -> bool:
    """Whether all entries are zero; a tensor without memory has none that is."""
    return not B.is_meta and not bool(B.float().any())  # float8 has no test of its own


def _size(model: nn.Module, name: str, parameter: Tensor) -> tuple[int, int]:
    """Entries and bytes of a parameter of the base; of one in few bits, those that it stands for and those that it takes."""
    layer, own = place_of(owner_of(model), name)
    form = in_few_bits(layer, own)
    if form is None:
        return parameter.numel(), parameter.numel() * parameter.element_size()
    d, k = QuantisedKind.shape(layer)
    return d * k, sum(t.numel() * t.element_size() for t in form.stored(layer))


_NOT_DENSE = ("is not a dense layer that deltaw adapts",)
_MOST = 4
"""Kinds of layers that one line names."""


@dataclass(frozen=True)
class Coverage:
    """The layers that take an update, and those that do not."""

    adapted: tuple[str, ...]
    """Dotted names of dense layers and weights, in the model's order."""
    left_out: dict[str, str]
    """Dotted name of every other module with a matrix of its own → why."""

    @cached_property
    def roles(self) -> dict[str, int]:
        """Role (q, k, v, o, gate, up, down, qkv, gate_up; other) → how many layers of it take an update."""
        return dict(Counter(role(name) or "other" for name in self.adapted))

    @cached_property
    def reasons(self) -> dict[str, list[str]]:
        """Reason → the layers that are left out for it."""
        grouped: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            grouped.setdefault(why, []).append(name)
        return grouped

    @property
    def dense(self) -> int:
        """How many dense layers there are, without embeddings and convolutions that only take an update where they are named."""
        others = [why for why in self.left_out.values() if not why.endswith((WHERE_NAMED, *_NOT_DENSE))]
        return len(self.adapted) + len(others)

    def lines(self) -> list[str]:
        """What there is to say at attach: a sentence on the layers that take an update, and one or two on those that do not.
        None of a method that has its updates elsewhere."""
        if not self.adapted:
            return []
        roles = ", ".join(f"{name} {count}" for name, count in self.roles.items())
        said = [f"{len(self.adapted)} of {self.dense} dense layers take an update" + (f" ({roles})." if roles else ".")]
        parts = [f"{_named(names)} ({why})" for why, names in self.reasons.items() if not why.endswith(WHERE_NAMED)]
        if parts:
            said.append(f"Left out: {'; '.join(parts)}.")
        where_named = [n for why, names in self.reasons.items() if why.endswith(WHERE_NAMED) for n in names]
        if where_named:
            said.append(f"Only where they are named: {_named(where_named)}.")
        return said


def coverage(
    modules: Mapping[str, nn.Module], updates: Mapping[str, Update], reasons: Mapping[str, str] = {}
) -> Coverage:
    """The coverage of these updates (module name → update) on a model's modules; `reasons` are those that its method has."""
    names: list[str] = []
    for name, update in updates.items():
        if update.of_weights:
            names += [dotted(name, own) for own in update.low_rank()]
        elif any(p.ndim > 1 for p in modules[name]._parameters.values() if p is not None):
            names.append(name)
    return Coverage(tuple(names), left_out(modules, {*names, *updates}, reasons))


def _named(names: list[str]) -> str:
    """Layers by the ends of their names, those that differ in a number alone once, with how many there are."""
    counts: dict[str, int] = {}
    for kind, alike in by_family(names).items():
        end = kind.rpartition("*.")[2]  # an encoder's layers and a decoder's may have the same
        counts[end] = counts.get(end, 0) + len(alike)
    ends = list(counts.items())
    shown = [f"{count} {end}" if count > 1 else end for end, count in ends[:_MOST]]
    more = sum(count for _, count in ends[_MOST:])
    return ", ".join(shown) + (f" and {more} more" if more else "")
