"""The adapter in training: A and B concatenated in a few flat buffers, and what else it trains. Knows updates, nothing of batches
or losses.

Hundreds of small tensors cost a step more in bookkeeping than in arithmetic. Here the optimizer sees one tensor of all A's and
one of all B's; the updates' A and B are views of them. Each step computes with a copy of the two in the base's dtype, the scale
multiplied into A; one operation makes it after each optimizer step. Gradients arrive in the copy's dtype and are added up in A's
and B's. The rest of an adapter (DoRA's magnitudes, embeddings, modules trained whole) is trained in tensors of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from deltaw.layers.tree import is_finite
from deltaw.methods.updates.base import Update, own_tensor
from deltaw.methods.updates.lowrank import LowRank, low_rank_parts
from deltaw.training.frozen import Int8
from deltaw.training.together import Branch, Member, Together, elsewhere

_LETTERS = ("A", "B")
_Key = tuple[torch.device, torch.dtype, torch.dtype]
"""Device, dtype of the parameter, dtype that its layer computes in."""


class Buffer:
    """Parameters of one key, concatenated: their values and gradients, and the copy that steps compute with."""

    def __init__(self, key: _Key, sizes: Sequence[int], scales: Sequence[float]) -> None:
        device, dtype, working = key
        self.values = nn.Parameter(torch.empty(sum(sizes), device=device, dtype=dtype))
        """[Σ size]"""
        self.gradient = self.values.grad = torch.zeros_like(self.values)
        self.copy = torch.empty(sum(sizes), device=device, dtype=working)
        self.copy_grad = torch.zeros_like(self.copy)
        self.scale: float | Tensor = scales[0]
        """The copy's factor over the values: one for all, or one for each entry."""
        if len(set(scales)) > 1:
            self.scale = torch.cat([torch.full((n,), s) for n, s in zip(sizes, scales, strict=True)]).to(device, dtype)

    def add_gradients(self) -> None:
        """Add the copy's gradient to the values'."""
        if isinstance(self.scale, Tensor):
            self.gradient.addcmul_(self.copy_grad.to(self.gradient.dtype), self.scale)
        else:
            self.gradient.add_(self.copy_grad, alpha=self.scale)
        self.copy_grad.zero_()

    def refresh(self) -> None:
        """Make the copy anew from the values."""
        torch.mul(self.values.detach(), self.scale, out=self.copy)


class Flat:
    """The updates' A's and B's in flat buffers. A context manager: on leaving, each update has tensors of its own again.

    While open, the layers of each of `groups` are computed together, where they are in training mode. `others` are updates that
    keep their own tensors, which are trained beside.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        updates: Mapping[str, LowRank],
        groups: Sequence[Sequence[str]],
        others: Mapping[str, Update] = MappingProxyType({}),
        *,
        int8: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Args: int8: the largest inputs (`largest_inputs`) of layers whose products with W0 are computed in 8 bits."""
        self.int8 = int8
        keys = {letter: {n: _key(layers[n], u, letter) for n, u in updates.items()} for letter in _LETTERS}
        self.layers = layers
        self.others = others
        self.updates = updates
        self.groups = [part for group in groups for part in _that_can_be_one(group, updates, keys["A"])]
        order = [name for group in self.groups for name in group]
        self.places = {letter: _placed(order, updates, letter, keys[letter]) for letter in _LETTERS}
        """Letter → layer name → the buffer that its A or B is in, and the index where it begins."""
        self.buffers = {
            letter: list({id(b): b for b, _ in places.values()}.values()) for letter, places in self.places.items()
        }
        self._loose = _loose_of(others)
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Flat:
        for name, update in self.updates.items():
            for letter, parameter in _factors(update).items():
                buffer, at = self.places[letter][name]
                values = _view(buffer.values.detach(), at, letter, *parameter.shape)
                parameter.data = values.copy_(parameter.detach())
                parameter.grad = _view(buffer.gradient, at, letter, *parameter.shape)
        for parameter in self._loose:
            parameter.grad = torch.zeros_like(parameter)
        self.refresh()
        branches: dict[str, Branch] = {}
        for group in self.groups:
            together = self._together(group)
            branches |= {name: partial(together.branch, i) for i, name in enumerate(group)}
        self._exit.enter_context(elsewhere(self.updates, branches))
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()
        for update in self.updates.values():
            for parameter in _factors(update).values():
                parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
                parameter.grad = None
        for parameter in self._loose:
            parameter.grad = None

    def add_gradients(self) -> None:
        """Add what a backward pass gave to the parameters' gradients. Call it after each."""
        for buffer in self._all():
            buffer.add_gradients()

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all that is trained, in few tensors."""
        return [*(buffer.gradient for buffer in self._all()), *map(_gradient, self._loose)]

    def refresh(self) -> None:
        """Let the next step compute with A and B as they are now. Call it after each change of them."""
        for buffer in self._all():
            buffer.refresh()

    def parameters(self, letter: str) -> list[nn.Parameter]:
        """Return all A's or all B's, in one tensor for each device and dtype; then those outside the buffers.

        What is neither A nor B is with the A's.
        """
        return [buffer.values for buffer in self.buffers[letter]] + self._loose_with(letter)

    def matrices(self, letter: str) -> list[nn.Parameter]:
        """Return the updates' A's or B's one by one, views of those tensors with gradients that are views of theirs; and the
        rest."""
        return [_factors(update)[letter] for update in self.updates.values()] + self._loose_with(letter)

    def vectors(self) -> list[nn.Parameter]:
        """Return what is trained besides and is no matrix: biases, norms, DoRA's magnitudes, (IA)³'s factors."""
        return [p for p in self._loose if p.ndim < 2]

    def zero_gradients(self) -> None:
        """Set all gradients to zero, in place: they stay views of the buffers'."""
        for buffer in self._all():
            buffer.gradient.zero_()
        for parameter in self._loose:
            _gradient(parameter).zero_()

    def unreached(self) -> list[str]:
        """Return the layers of which nothing, or no B, got any gradient in the backward passes so far."""
        unreached = [name for name, update in self.updates.items() if not _gradient(update.B).any()]
        for name, update in self.others.items():
            A = update.factors().get("A")
            if not any(bool(_gradient(p).any()) for p in update.parameters() if p is not A):
                unreached.append(name)
        return unreached

    def not_finite(self) -> list[str]:
        """Return the layers with a gradient that is not finite."""
        every = {**self.updates, **self.others}
        return [n for n, u in every.items() if not all(is_finite(_gradient(p)) for p in u.parameters())]

    def _loose_with(self, letter: str) -> list[nn.Parameter]:
        return [p for p, counted_with in self._loose.items() if counted_with == letter]

    def _all(self) -> list[Buffer]:
        return [*self.buffers["A"], *self.buffers["B"]]

    def _together(self, group: Sequence[str]) -> Together:
        updates = [self.updates[name] for name in group]
        buffer, at = self.places["A"][group[0]]
        A = _leaf(buffer, at, "A", sum(u.rank for u in updates), updates[0].A.shape[1])
        members, row = [], 0
        for name, update in zip(group, updates, strict=True):
            B = _leaf(*self.places["B"][name], "B", *update.B.shape)
            members.append(Member(self.layers[name], update, slice(row, row + update.rank), B))
            row += update.rank
        largest = self.int8.get(group[0])  # of a group, all read the same
        return Together(A, members, None if largest is None else Int8([m.W0 for m in members], largest))


def _factors(update: LowRank) -> dict[str, nn.Parameter]:
    return {"A": update.A, "B": update.B}


def _key(layer: nn.Module, update: LowRank, letter: str) -> _Key:
    parameter = _factors(update)[letter]
    # A quantised weight does not say what its layer computes in: its branch rounds A and B itself
    working = own_tensor(layer, "weight").dtype if update.kind.as_it_is else parameter.dtype
    return parameter.device, parameter.dtype, working


def _that_can_be_one(
    group: Sequence[str], updates: Mapping[str, LowRank], keys: Mapping[str, _Key]
) -> Sequence[Sequence[str]]:
    """Return the group, if its A's fit one buffer and its layers' weights can be multiplied here; else each layer alone."""
    as_one = len({keys[n] for n in group}) == 1 and all(updates[n].kind.as_it_is for n in group)
    return [group] if as_one else [[n] for n in group]


def _placed(
    order: Sequence[str], updates: Mapping[str, LowRank], letter: str, keys: Mapping[str, _Key]
) -> dict[str, tuple[Buffer, int]]:
    """Assign the A's or B's to buffers, one for each key, in their `order`."""
    by_key: dict[_Key, list[str]] = {}
    for name in order:
        by_key.setdefault(keys[name], []).append(name)
    places = {}
    for key, names in by_key.items():
        sizes = [_factors(updates[n])[letter].numel() for n in names]
        buffer = Buffer(key, sizes, [updates[n].scale if letter == "A" else 1.0 for n in names])
        at = 0
        for name, size in zip(names, sizes, strict=True):
            places[name] = buffer, at
            at += size
    return places


def _loose_of(others: Mapping[str, Update]) -> dict[nn.Parameter, str]:
    """Return each parameter of these updates, once, with the letter that it is counted with."""
    Bs = {part.factors()["B"] for part in low_rank_parts(others)}
    return {p: "B" if p in Bs else "A" for update in others.values() for p in update.parameters()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _view(flat: Tensor, at: int, letter: str, rows: int, columns: int) -> Tensor:
    """Return a matrix [rows, columns] of a flat buffer. B lies there by its columns: products with its transpose are faster."""
    part = flat[at : at + rows * columns]
    return part.view(rows, columns) if letter == "A" else part.view(columns, rows).t()


def _leaf(buffer: Buffer, at: int, letter: str, rows: int, columns: int) -> Tensor:
    """Return a matrix of the copy that steps compute with, whose gradient arrives in the copy's gradient."""
    leaf = _view(buffer.copy, at, letter, rows, columns).requires_grad_()
    leaf.grad = _view(buffer.copy_grad, at, letter, rows, columns)
    return leaf
