"""A look at a model's adapters: their names, parameters, sizes and ΔW, and which dense layers they change. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from deltaw.errors import AdapterError, nearest
from deltaw.layers.kinds import QUANTISED, as_stored, in_few_bits, weights_of
from deltaw.layers.names import by_family
from deltaw.layers.ops.merging import dense
from deltaw.layers.ops.rows import Rows
from deltaw.layers.patch import slot_of
from deltaw.layers.processes.shards import full
from deltaw.layers.tree import base_modules, dotted, owner_of, place_of
from deltaw.methods.targets import WHERE_NAMED, left_out, role
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.lowrank import low_rank_parts
from deltaw.model.ends import taught
from deltaw.model.merging.kept import before_merge
from deltaw.model.record import bring, find_record, in_use, known, named_parameters, on_whole_layers, record_of


class Names(tuple[str, ...]):
    """The names of the attached adapters in order; `.active` is the one in use, or None."""

    active: str | None = None

    def __repr__(self) -> str:
        return "(" + ", ".join(f"{n!r}*" if n == self.active else repr(n) for n in self) + ")"


def adapters(model: nn.Module) -> Names:
    """Return the names of the attached adapters; their `.active` is the one that this thread goes through.

    Args:
        model: Any model.

    Returns:
        A tuple of names in the order of attaching, empty for a model without adapters. `.active` is None for the base, and if the
        rows of a batch have adapters of their own.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4), name="a")
    >>> deltaw.adapters(model), deltaw.adapters(model).active
    (('a'*), 'a')
    """
    record = find_record(model)
    names = Names(record.attached if record else ())
    chosen = record.route.current() if record else None
    names.active = None if isinstance(chosen, Rows) else chosen
    return names


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the parameters of an adapter, for any optimizer.

    Args:
        model: The model with the adapter.
        name: The adapter; the active one by default.

    Returns:
        A and B of each layer, or another method's parameters, in the model's order. One that layers share is there once.

    Raises:
        AdapterError: There is no such adapter, or none is active.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4, targets="q"))
    >>> [tuple(parameter.shape) for parameter in deltaw.parameters(model)]
    [(4, 32), (32, 4), (4, 32), (32, 4)]
    """
    by_identity = {id(p): p for update in updates(model, name).values() for p in update.parameters()}
    return list(by_identity.values())


def updates(model: nn.Module, name: str | None = None) -> dict[str, Update]:
    """Return an adapter's update of each layer by the layer's name, with its tensors on the layers' device.

    None means the active adapter. Raises AdapterError if there is no such adapter.
    """
    record = record_of(model)
    name = in_use(record) if name is None else known(record, name)
    bring(record, [name])
    owner = owner_of(model)
    by_layer: dict[str, Update] = {}
    for layer_name in record.attached[name].layers:
        slot = slot_of(owner.get_submodule(layer_name))
        assert slot is not None
        by_layer[layer_name] = slot.get(name)
    return by_layer


@on_whole_layers
def delta(model: nn.Module, layer: str, name: str | None = None) -> Tensor:
    """Return ΔW of one layer, by the arithmetic of merges.

    Args:
        model: The model with the adapter.
        layer: The layer's dotted name, or that of a weight without a layer, such as a mixture's experts.
        name: The adapter; the active one by default.

    Returns:
        ΔW [d, k] in fp32, in float64 for a float64 weight. A stack of matrices keeps its own shape.

    Raises:
        AdapterError: There is no such adapter, or it has no update on the layer's weight.
        MergeError: The layer's weight is merged and was changed since.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4))
    >>> dW = deltaw.delta(model, "model.layers.0.mlp.up_proj")
    >>> dW.shape, bool(dW.any())  # B starts at zero
    (torch.Size([56, 32]), False)
    """
    by_module = updates(model, name)
    module, _, own_name = (layer, "", "weight") if layer in by_module else layer.rpartition(".")
    if module not in by_module:
        raise AdapterError(f"The adapter has no update on {layer!r}{nearest(layer, by_module)}.")
    owner = owner_of(model).get_submodule(module)
    change = by_module[module].changes(owner).get(own_name)
    if change is None:
        raise AdapterError(f"The adapter leaves the weight of {layer!r} as it is.")
    dW = dense(change, before_merge(model, dotted(module, own_name)))
    return as_stored(owner, own_name, dW) if own_name in weights_of(owner) else dW


# --- sizes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterSummary:
    """The size of one adapter, and what it reaches."""

    layers: int
    """Modules that have an update: of a loaded adapter, those that its file reached."""
    parameters: int
    """Numbers that it holds."""
    share: float
    """`parameters` as a share of the base's."""
    bytes: int
    coverage: Coverage
    """The dense layers that take an update, by role, and why the others do not."""
    zero: int = 0
    """Low-rank updates with a B of zeros, which change nothing; before the first step of a training all are so."""
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
    """The sizes of a base and of each of its adapters, as `summary` returns them.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4), name="a")
    >>> found = deltaw.summary(model)
    >>> found.active, list(found.adapters), found.adapters["a"].zero
    ('a', ['a'], 14)
    """

    base_parameters: int
    """Numbers that the base holds; a quantised weight counts as those that it stands for."""
    base_bytes: int
    """Bytes of these numbers as they are stored."""
    active: str | None
    """The adapter in use, as `adapters` tells it."""
    adapters: dict[str, AdapterSummary]
    """Name → the adapter's layers, parameters and bytes."""


def summary(model: nn.Module) -> Summary:
    """Return the sizes of the base and of each attached adapter.

    Args:
        model: Any model.

    Returns:
        The base's numbers and bytes, and for each adapter its own, its layers and why others are left out.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4, targets="attention"))
    >>> adapter = deltaw.summary(model).adapters["default"]
    >>> adapter.layers, adapter.parameters, adapter.coverage.roles
    (8, 1792, {'q': 2, 'k': 2, 'v': 2, 'o': 2})
    """
    sizes = [_size(model, name, p) for name, p in named_parameters(model)]
    count = sum(n for n, _ in sizes)
    of_adapters = {name: _adapter_summary(model, name, count) for name in adapters(model)}
    return Summary(count, sum(size for _, size in sizes), adapters(model).active, of_adapters)


def _adapter_summary(model: nn.Module, name: str, base_parameters: int) -> AdapterSummary:
    tensors = parameters(model, name)
    count = sum(p.numel() for p in tensors)
    attached = record_of(model).attached[name]
    return AdapterSummary(
        layers=len(attached.layers),
        parameters=count,
        share=count / base_parameters,
        bytes=sum(p.numel() * p.element_size() for p in tensors),
        coverage=coverage_of(model, name),
        zero=sum(_is_zero(part.B.detach()) for part in low_rank_parts(updates(model, name))),
        rounding=attached.metadata.get("rounding", 0.0),
        ends=taught(model, [name]),
    )


def _is_zero(B: Tensor) -> bool:
    """Return whether all entries are zero; False for a tensor on the meta device, which has no entries."""
    return not B.is_meta and not bool(full(B).float().any())  # float8 has no `any`


def _size(model: nn.Module, name: str, parameter: Tensor) -> tuple[int, int]:
    """Return (numbers, bytes) of a base parameter: of a quantised one the numbers that it stands for and the bytes that it
    takes."""
    layer, own_name = place_of(owner_of(model), name)
    form = in_few_bits(layer, own_name)
    if form is None:
        return parameter.numel(), parameter.numel() * parameter.element_size()
    d, k = QUANTISED.shape(layer)
    return d * k, sum(t.numel() * t.element_size() for t in form.stored(layer))


# --- coverage -----------------------------------------------------------------------------------------------------


def coverage_of(model: nn.Module, name: str) -> Coverage:
    """Return the dense layers of the model that an adapter changes, and why it leaves the others out."""
    return coverage(dict(base_modules(model)), updates(model, name), record_of(model).attached[name].left_out)


_NOT_DENSE = ("is not a dense layer that deltaw adapts",)
_MOST = 4
"""The most kinds of layers that one line names."""


@dataclass(frozen=True)
class Coverage:
    """The layers that take an update, and those that do not."""

    adapted: tuple[str, ...]
    """Dotted names of dense layers and weights, in the model's order."""
    left_out: dict[str, str]
    """Dotted name of every other module with a matrix of its own → why."""

    @cached_property
    def roles(self) -> dict[str, int]:
        """Role (q, k, v, o, gate, up, down, qkv, gate_up or other) → how many layers of it take an update."""
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
        """The number of dense layers, without embeddings and convolutions, which take an update only if they are named."""
        others = [why for why in self.left_out.values() if not why.endswith((WHERE_NAMED, *_NOT_DENSE))]
        return len(self.adapted) + len(others)

    def lines(self) -> list[str]:
        """Return sentences for the log: one on the layers that take an update, one or two on the others.

        Empty for a method that has its updates elsewhere.
        """
        if not self.adapted:
            return []
        roles = ", ".join(f"{name} {count}" for name, count in self.roles.items())
        lines = [
            f"{len(self.adapted)} of {self.dense} dense layers take an update" + (f" ({roles})." if roles else ".")
        ]
        parts = [f"{_named(names)} ({why})" for why, names in self.reasons.items() if not why.endswith(WHERE_NAMED)]
        if parts:
            lines.append(f"Left out: {'; '.join(parts)}.")
        where_named = [n for why, names in self.reasons.items() if why.endswith(WHERE_NAMED) for n in names]
        if where_named:
            lines.append(f"Only where they are named: {_named(where_named)}.")
        return lines


def coverage(
    modules: Mapping[str, nn.Module], updates: Mapping[str, Update], reasons: Mapping[str, str] = {}
) -> Coverage:
    """Return the coverage of updates (module name → update) on a model's modules; `reasons` are the method's for leaving some
    out."""
    names: list[str] = []
    for name, update in updates.items():
        if update.of_weights:
            names += [dotted(name, weight) for weight in update.low_rank()]
        elif any(p.ndim > 1 for p in modules[name]._parameters.values() if p is not None):
            names.append(name)
    return Coverage(tuple(names), left_out(modules, {*names, *updates}, reasons))


def _named(names: list[str]) -> str:
    """Return layers by the ends of their names: one entry, with a count, for those that differ only in a number."""
    counts: dict[str, int] = {}
    for kind, alike in by_family(names).items():
        end = kind.rpartition("*.")[2]  # an encoder's layers and a decoder's may end alike
        counts[end] = counts.get(end, 0) + len(alike)
    ends = list(counts.items())
    shown = [f"{count} {end}" if count > 1 else end for end, count in ends[:_MOST]]
    more = sum(count for _, count in ends[_MOST:])
    return ", ".join(shown) + (f" and {more} more" if more else "")
