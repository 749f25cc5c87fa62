"""A batch whose rows have adapters of their own: which rows each adapter has, and a layer's A's and B's in stacks. Knows
updates by their A, B, scale and dropout; no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw import mixed
from deltaw.errors import AdapterError
from deltaw.mixed import Order, Stack


@dataclass(frozen=True)
class Layer:
    """The stacks of one layer, and what they were made of."""

    stacks: list[Stack]
    members: tuple[tuple[str, ...], ...]
    """Names of each stack's adapters."""
    parameters: list[Tensor]
    """A and B of each of them."""
    versions: list[int]
    """Of those when the stacks were made: a change in place counts one up."""
    first: Any
    """The first update: they are in training mode together."""
    training: bool
    dtype: torch.dtype
    """Of the layer's output."""
    device: torch.device
    singly: tuple[str, ...]
    """Adapters whose updates cannot be stacked: each is computed on its own rows."""

    def still_holds(self, out: Tensor) -> bool:
        """Whether nothing has changed since: asked in each pass, so kept short."""
        return (
            self.dtype == out.dtype
            and self.training == self.first.training
            and self.device == out.device
            and self.versions == _versions(self.parameters)
        )

    def learns(self) -> bool:
        """Whether gradients are wanted, which flow into stacks that are made anew in each pass."""
        return _wanted(self.parameters)


def _wanted(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


class Rows:
    """An adapter, or none, for each row of a batch. A batch of m·n rows for n names is read as m rows of each, one after the
    other, which is how beams and several sequences of one prompt lie."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            if name is not None:
                self.rows.setdefault(name, []).append(row)
        self.kept: dict[int, Layer] = {}
        """Stacks by layer, shared by blocks with the same adapters for as many rows each."""
        self.seen: set[int] = set()
        """Layers whose kept stacks are of the very tensors that the updates have now. Within a block these are not exchanged."""
        self.orders: dict[Any, Order] = {}

    def through(self, module: Any, updates: Mapping[str, Any], x: Tensor, out: Tensor) -> Tensor:
        """The output of a layer, of which `out` [..., d] is the base's part and x [..., k] the input, with each row's branch.
        Raises AdapterError for a batch of another number of rows."""
        layer = self.kept.get(id(updates)) if id(updates) in self.seen else None
        if layer is None or layer.learns() or not layer.still_holds(out):
            layer = self._made(updates, out)
            if layer is None:
                return out
        n = len(self.names)
        if x.dim() < 2 or x.shape[0] % n or out.shape[0] != x.shape[0]:
            raise AdapterError(
                f"The route names {n} rows, but a layer's input is {list(x.shape)}: its first dimension must be {n}, or a "
                "multiple of it. Give route one name for each row of the batch."
            )
        if layer.stacks:
            flat = out.reshape(n, -1, out.shape[-1])
            flat = mixed.add_branches(flat, x.reshape(n, -1, x.shape[-1]), layer.stacks, self._order(layer, out.device))
            out = flat.view(out.shape)
        for name in layer.singly:
            out = self._placed(name, updates[name].branch(module, self._of(name, x)), out)
        return out

    def _of(self, name: str, x: Tensor) -> Tensor:
        """The rows of a batch that this adapter has."""
        n = len(self.names)
        return x.reshape(n, -1, *x.shape[1:])[self.rows[name]].flatten(0, 1)

    def _placed(self, name: str, own: Tensor, out: Tensor) -> Tensor:
        """`out` with this adapter's rows in it."""
        if own.shape[1:] != out.shape[1:]:
            raise AdapterError(
                f"Adapter {name!r} has another vocabulary than the base ({own.shape[-1]} tokens, not {out.shape[-1]}): its rows "
                "cannot be in one batch with others. Use it by itself."
            )
        n = len(self.names)
        rows = torch.tensor(self.rows[name], device=out.device)
        split = out.reshape(n, -1, *out.shape[1:])
        return split.index_copy(0, rows, own.view(len(rows), *split.shape[1:])).view(out.shape)

    def _made(self, updates: Mapping[str, Any], out: Tensor) -> Layer | None:
        """The layer's stacks, those that were kept if they are still good; None where none of the rows' adapters has the
        layer."""
        groups = self._groups(updates)
        singly = tuple(name for name in self.rows if name in updates and not updates[name].stackable)
        if not groups and not singly:
            return None
        parameters = [tensor for names in groups for name in names for tensor in (updates[name].A, updates[name].B)]
        kept = self.kept.get(id(updates))
        same = kept is not None and [id(p) for p in kept.parameters] == [id(p) for p in parameters]
        if kept is not None and same and kept.singly == singly and not kept.learns() and kept.still_holds(out):
            self.seen.add(id(updates))
            return kept
        first = updates[groups[0][0] if groups else singly[0]]
        learns = _wanted(parameters)
        with torch.inference_mode(False), torch.set_grad_enabled(learns):  # a later pass may want gradients of x
            stacks = [_stack([updates[name] for name in names], out.dtype) for names in groups]
        versions = _versions(parameters)
        layer = Layer(stacks, groups, parameters, versions, first, first.training, out.dtype, out.device, singly)
        if not learns:
            self.kept[id(updates)] = layer
            self.seen.add(id(updates))
        return layer

    def _groups(self, updates: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
        """Adapters that can be one stack, in the order of their names."""
        groups: dict[Any, list[str]] = {}
        for name in sorted(self.rows):
            update = updates.get(name)
            if update is not None and update.stackable:
                key = update.rank, len(self.rows[name]), update.A.dtype, update.dropout if update.training else 0.0
                groups.setdefault(key, []).append(name)
        return tuple(tuple(group) for group in groups.values())

    def _order(self, layer: Layer, device: torch.device) -> Order:
        key = device, layer.members
        if key not in self.orders:
            rows = [[row for name in names for row in self.rows[name]] for names in layer.members]
            self.orders[key] = mixed.order(rows, len(self.names), device)
        return self.orders[key]


def _stack(updates: Sequence[Any], dtype: torch.dtype) -> Stack:
    """Of updates with one rank and dtype, for a layer that computes in `dtype`; in their own where that is less: it was
    asked for, and is less to read."""
    first = updates[0]
    stored = first.A.dtype
    working = stored if stored.itemsize < dtype.itemsize else dtype
    A, B = mixed.stacked([u.A for u in updates], [u.B for u in updates], [u.scale for u in updates], working)
    return Stack(A, B, first.dropout if first.training else 0.0)
