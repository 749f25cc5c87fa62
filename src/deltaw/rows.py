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
from deltaw.versions import steps


@dataclass(frozen=True)
class Layer:
    """The stacks of one layer, and what they were made of."""

    stacks: list[Stack]
    members: tuple[tuple[str, ...], ...]
    """Names of each stack's adapters."""
    singly: tuple[str, ...]
    """Adapters whose updates cannot be stacked: each is computed on its own rows."""
    updates: dict[str, Any]
    """All of the rows' adapters → their updates, None for one that has none on this layer."""
    parameters: list[Tensor]
    """A and B of each that is stacked."""
    tensors: list[int]
    """What tells these from others, and from themselves with other memory."""
    counted: list[Tensor]
    """Of these, those that count changes in place."""
    versions: list[int]
    """Their counts when the stacks were made."""
    steps: int
    """That optimizers had taken by then: not all of them are counted."""
    training: bool
    dtype: torch.dtype
    """Of the layer's output."""
    device: torch.device

    def still_holds(self, out: Tensor) -> bool:
        """Whether nothing was written since: asked in each pass, so kept short."""
        return (
            self.dtype == out.dtype
            and self.device == out.device
            and self.training == next(iter(self.updates.values())).training
            and self.steps == steps()
            and self.versions == [t._version for t in self.counted]
        )

    def is_of(self, updates: Mapping[str, Any]) -> bool:
        """Whether these are the updates that the stacks were made of, with the same tensors: asked once in a block."""
        same = all(updates.get(name) is update for name, update in self.updates.items())
        return same and self.tensors == _tensors(self._stacked())

    def learns(self) -> bool:
        """Whether gradients are wanted, which flow into stacks that are made anew in each pass."""
        return _wanted(self.parameters)

    def _stacked(self) -> list[Any]:
        return [self.updates[name] for names in self.members for name in names]


def _tensors(updates: Sequence[Any]) -> list[int]:
    """Which A, B and bias these have, and where. (The modules' own dictionaries: there may be a hundred adapters.)"""
    found: list[int] = []
    for own in [update._parameters for update in updates]:
        A, B = own["A"], own["B"]
        found += (id(A), id(B), A.data_ptr(), B.data_ptr(), id(own["bias"]))
    return found


def _wanted(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


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
        kept = self.kept.get(id(updates))
        if kept is not None and kept.is_of(updates) and not kept.learns() and kept.still_holds(out):
            self.seen.add(id(updates))
            return kept
        groups = self._groups(updates)
        singly = tuple(name for name in self.rows if name in updates and not updates[name].stackable)
        if not groups and not singly:
            return None
        layer = self._stacked(updates, groups, singly, out)
        if not layer.learns():
            self.kept[id(updates)] = layer
            self.seen.add(id(updates))
        return layer

    def _stacked(
        self, updates: Mapping[str, Any], groups: tuple[tuple[str, ...], ...], singly: tuple[str, ...], out: Tensor
    ) -> Layer:
        """New stacks. (The first of `updates` is one that there is: they are in training mode together.)"""
        stacked = [updates[name] for names in groups for name in names]
        parameters = [tensor for update in stacked for tensor in (update.A, update.B)]
        counted = [t for t in parameters if not t.is_inference()]
        first = groups[0][0] if groups else singly[0]
        own = {first: updates[first]} | {name: updates.get(name) for name in self.rows}
        # Not under inference mode: a later pass may want gradients of x
        with torch.inference_mode(False), torch.set_grad_enabled(_wanted(parameters)):
            stacks = [_stack([updates[name] for name in names], out.dtype) for names in groups]
        return Layer(
            stacks, groups, singly, own, parameters, _tensors(stacked), counted, [t._version for t in counted], steps(),
            updates[first].training, out.dtype, out.device,
        )  # fmt: skip

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
    asked for, and is less to read. (But for 8 bits, which have no products.)"""
    first = updates[0]
    stored = first.A.dtype
    working = stored if 1 < stored.itemsize < dtype.itemsize else dtype
    A, B = mixed.stacked([u.A for u in updates], [u.B for u in updates], [u.scale for u in updates], working)
    return Stack(A, B, first.dropout if first.training else 0.0)
