"""The adapter in training: A and B end to end in a few flat buffers, and what else it trains. Knows updates, nothing of batches
or losses.

Hundreds of small tensors cost a step more in bookkeeping than in arithmetic. Here the optimizer sees one tensor of all A's and
one of all B's, which the updates' own A and B are views of; and each step computes with one copy of them in the base's
dtype, the scale multiplied into A, made after each optimizer step by one operation. Gradients arrive in that copy's dtype and are
added up in A's and B's own. What is more than A and B of a dense layer (DoRA, embeddings, modules trained whole) is trained in
tensors of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.methods.updates.base import Update
from deltaw.methods.updates.lowrank import LowRank, low_rank_parts
from deltaw.training.together import Branch, Member, Together, elsewhere

_Key = tuple[torch.device, torch.dtype, torch.dtype]
"""Device, dtype of the parameter, dtype that its layer computes in."""


class _Buffer:
    """Parameters of one key end to end: their values and gradients, and the copy that steps compute with."""

    def __init__(self, key: _Key, parameters: Sequence[nn.Parameter], scales: Sequence[float]) -> None:
        device, dtype, working = key
        sizes = [p.numel() for p in parameters]
        self.values = nn.Parameter(torch.empty(sum(sizes), device=device, dtype=dtype))
        self.gradient = self.values.grad = torch.zeros_like(self.values)
        self.copy = torch.empty(sum(sizes), device=device, dtype=working)
        self.copy_grad = torch.zeros_like(self.copy)
        self.scale: float | Tensor = scales[0]
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
        """The copy follows the values."""
        torch.mul(self.values.detach(), self.scale, out=self.copy)


class Flat:
    """The updates' A's and B's in flat buffers. A context manager: on leaving, each update has tensors of its own again.

    While open, the layers of each of `groups` are computed together, where they are in training mode. `others` are updates that
    keep their own tensors, which are trained beside.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        updates: Mapping[str, LowRank],
        groups: Sequence[Sequence[str]],
        others: Mapping[str, Update] = MappingProxyType({}),
    ) -> None:
        self.layers = layers
        self.others = others
        self.updates = updates
        self.groups = [part for group in groups for part in self._alike(group)]
        self.places = {letter: self._placed(letter) for letter in "AB"}
        self.buffers = {letter: list({id(b): b for b, _ in self.places[letter].values()}.values()) for letter in "AB"}

    def __enter__(self) -> Flat:
        for name, update in self.updates.items():
            for letter, parameter in (("A", update.A), ("B", update.B)):
                buffer, at = self.places[letter][name]
                values = _view(buffer.values.detach(), at, letter, *parameter.shape)
                parameter.data = values.copy_(parameter.detach())
                parameter.grad = _view(buffer.gradient, at, letter, *parameter.shape)
        for parameter in self._loose():
            parameter.grad = torch.zeros_like(parameter)
        self.refresh()
        branches: dict[str, Branch] = {}
        for group in self.groups:
            together = self._together(group)
            branches |= {name: partial(together.branch, i) for i, name in enumerate(group)}
        self.open = contextlib.ExitStack()
        self.open.enter_context(elsewhere(self.updates, branches))
        return self

    def __exit__(self, *error: object) -> None:
        self.open.close()
        for update in self.updates.values():
            for parameter in (update.A, update.B):
                parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
                parameter.grad = None
        for parameter in self._loose():
            parameter.grad = None

    def add_gradients(self) -> None:
        """After each backward pass: add what it gave to the parameters' gradients."""
        for buffer in self._all():
            buffer.add_gradients()

    def refresh(self) -> None:
        """After each change of A and B: the next step computes with them as they are now."""
        for buffer in self._all():
            buffer.refresh()

    def parameters(self, letter: str) -> list[nn.Parameter]:
        """All A's or all B's, in one tensor for each device and dtype; then those that are by themselves. What is neither A nor
        B is with the A's."""
        return [buffer.values for buffer in self.buffers[letter]] + self._loose(letter)

    def matrices(self, letter: str) -> list[nn.Parameter]:
        """The updates' own A's or B's, views of those tensors, whose gradients are views of theirs; and the rest."""
        return [getattr(update, letter) for update in self.updates.values()] + self._loose(letter)

    def vectors(self) -> list[nn.Parameter]:
        """What is trained besides and is no matrix: biases, norms, DoRA's magnitudes, (IA)³'s factors."""
        return [p for p in self._loose() if p.ndim < 2]

    def zero_gradients(self) -> None:
        for buffer in self._all():
            buffer.gradient.zero_()
        for parameter in self._loose():
            _gradient(parameter).zero_()

    def unreached(self) -> list[str]:
        """After a backward pass: the layers of which nothing, or no B, got any gradient."""
        dead = [name for name, update in self.updates.items() if not _gradient(update.B).any()]
        for name, update in self.others.items():
            A = update.factors().get("A")
            own = [p for p in update.parameters() if p is not A]
            if not any(bool(_gradient(p).any()) for p in own):
                dead.append(name)
        return dead

    def _loose(self, letter: str = "AB") -> list[nn.Parameter]:
        """Parameters of the other updates, each once."""
        Bs = {part.factors()["B"] for part in low_rank_parts(self.others)}
        every = dict.fromkeys(p for update in self.others.values() for p in update.parameters())
        return [p for p in every if ("B" if p in Bs else "A") in letter]

    def _all(self) -> list[_Buffer]:
        return [*self.buffers["A"], *self.buffers["B"]]

    def _alike(self, group: Sequence[str]) -> Sequence[Sequence[str]]:
        """The group, if its A's can lie in one buffer, and products with its weights be made here."""
        as_one = len({self._key(n, "A") for n in group}) == 1 and all(self.updates[n].kind.as_it_is for n in group)
        return [group] if as_one else [[n] for n in group]

    def _key(self, name: str, letter: str) -> _Key:
        update = self.updates[name]
        parameter: Tensor = getattr(update, letter)
        # A weight in few bits does not say what its layer computes in: its branch rounds A and B itself
        working = self.layers[name].weight.dtype if update.kind.as_it_is else parameter.dtype
        return parameter.device, parameter.dtype, working

    def _placed(self, letter: str) -> dict[str, tuple[_Buffer, int]]:
        """Layer name → the buffer that its A or B is in, and where. A group's A's are next to each other."""
        by_key: dict[_Key, list[str]] = {}
        for name in (name for group in self.groups for name in group):
            by_key.setdefault(self._key(name, letter), []).append(name)
        places = {}
        for key, names in by_key.items():
            parameters = [getattr(self.updates[n], letter) for n in names]
            buffer = _Buffer(key, parameters, [self.updates[n].scale if letter == "A" else 1.0 for n in names])
            at = 0
            for name, parameter in zip(names, parameters, strict=True):
                places[name] = buffer, at
                at += parameter.numel()
        return places

    def _together(self, group: Sequence[str]) -> Together:
        updates = [self.updates[name] for name in group]
        buffer, at = self.places["A"][group[0]]
        A = _leaf(buffer, at, "A", sum(u.rank for u in updates), updates[0].A.shape[1])
        members, row = [], 0
        for name, update in zip(group, updates, strict=True):
            B = _leaf(*self.places["B"][name], "B", *update.B.shape)
            members.append(Member(self.layers[name], update, slice(row, row + update.rank), B))
            row += update.rank
        return Together(A, members)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _view(flat: Tensor, at: int, letter: str, rows: int, columns: int) -> Tensor:
    """A matrix in a flat buffer. B lies there by its columns: products with its transpose are faster."""
    part = flat[at : at + rows * columns]
    return part.view(rows, columns) if letter == "A" else part.view(columns, rows).t()


def _leaf(buffer: _Buffer, at: int, letter: str, rows: int, columns: int) -> Tensor:
    """A matrix of the copy that steps compute with, whose gradient arrives in the copy's gradient."""
    leaf = _view(buffer.copy, at, letter, rows, columns).requires_grad_()
    leaf.grad = _view(buffer.copy_grad, at, letter, rows, columns)
    return leaf
