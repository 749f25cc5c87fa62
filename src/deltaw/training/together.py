"""Adapted layers that read the same tensor (q, k, v; gate, up) computed as one, while the model's code goes on calling them one
by one: the first call computes the outputs of all and keeps the others' until they are asked for. Knows layers and their updates,
nothing of losses or optimizers.

One forward pass shows which layers belong together. Should one of a group later be called with another tensor, it is computed
alone, and from then on so are all of that group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltaw.layers.ops import linear
from deltaw.methods.updates.lowrank import LowRank
from deltaw.training.frozen import Int8

Branch = Callable[[nn.Module, Tensor], Tensor]
"""Layer and x [..., k] → the layer's output with its update, [..., d]."""


@contextlib.contextmanager
def elsewhere(updates: Mapping[str, LowRank], branches: Mapping[str, Branch]) -> Iterator[None]:
    """Compute the branches of these layers, while open, by these functions."""
    try:
        for name, branch in branches.items():
            updates[name].elsewhere = branch
        yield
    finally:
        for name in branches:
            updates[name].elsewhere = None


def same_input(updates: Mapping[str, LowRank], forward: Callable[[], object]) -> list[list[str]]:
    """Return the names of `updates` in groups: layers that `forward` calls one after the other with the same tensor.

    A layer is alone that is called twice or never, or drops entries of x by a dropout of its own.
    """
    calls: list[tuple[str, Tensor, int]] = []

    def note(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        calls.append((name, x, x._version))  # x is held, so that no later tensor gets its identity
        return updates[name].alone(layer, x)

    with elsewhere(updates, {name: partial(note, name) for name in updates}):
        forward()
    called = [name for name, _, _ in calls]
    groups: list[list[str]] = []
    before: Tensor | None = None
    changes = 0
    for name, x, version in calls:
        if called.count(name) > 1 or updates[name].dropout > 0:
            before = None
        elif x is before and version == changes:
            groups[-1].append(name)
        else:
            groups.append([name])
            before, changes = x, version
    grouped = {name for group in groups for name in group}
    return groups + [[name] for name in updates if name not in grouped]


def largest_inputs(updates: Mapping[str, LowRank], forward: Callable[[], object]) -> dict[str, Tensor]:
    """Return the largest entry of each column of what layers read in `forward`, fp32 [k]: of those that are called, and are a
    product with their weight as it is."""
    largest: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        entries = x.detach().abs().flatten(0, -2).amax(0).float()
        largest[name] = torch.maximum(largest.get(name, entries), entries)
        return updates[name].alone(layer, x)

    products = [name for name, update in updates.items() if update.kind.multiplies and update.kind.as_it_is]
    with elsewhere(updates, {name: partial(note, name) for name in products}):
        forward()
    return largest


@dataclass(frozen=True)
class Member:
    """One layer of a group."""

    layer: nn.Module
    update: LowRank
    rows: slice
    """Its rows of the group's A, which is scaled already."""
    B: Tensor
    """[d, r]"""

    @property
    def W0(self) -> Tensor:
        """The layer's weight, [d, k]."""
        return self.update.W0(self.layer)


class _Part(NamedTuple):
    """The fields that a kind's branch reads of an update."""

    A: Tensor
    B: Tensor
    dropout: float
    scale: float = 1.0
    training: bool = True


class Together:
    """A group of layers in training; `branch` computes each. A [Σr, k] is the members' A's, stacked in order."""

    def __init__(self, A: Tensor, members: Sequence[Member], frozen: Int8 | None = None) -> None:
        """Args: frozen: the members' W0 in 8 bits, if their products are to be computed so."""
        self.A = A
        self.members = members
        self.frozen = frozen
        self.one = len(members) > 1 or frozen is not None
        """False from the first call on that does not fit."""
        self.kept: dict[int, Tensor] = {}
        """Place of a member → its output, computed and not yet asked for."""
        self.x: Tensor | None = None
        self.version = 0
        """The version of `x` when `kept` was computed: in-place changes count it up."""

    def branch(self, place: int, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the output of the member in this place: x [..., k] → [..., d]."""
        member = self.members[place]
        if not member.update.training:
            return member.update.alone(layer, x)
        if not self.one:
            return self._alone(member, x)
        if place == 0:
            self._compute(x)
        out = self.kept.pop(place, None)
        if out is None or x is not self.x or x._version != self.version:
            self.one = False
            self._forget()
            return self._alone(member, x)
        if not self.kept:
            self._forget()
        return out

    def _alone(self, member: Member, x: Tensor) -> Tensor:
        A = self.A if len(self.members) == 1 else self.A[member.rows]
        part = _Part(A, member.B, member.update.dropout)
        return member.update.kind.branch(member.layer, x, part, member.layer._parameters.get("bias"))

    def _compute(self, x: Tensor) -> None:
        members = self.members
        biases = [m.layer._parameters.get("bias") for m in members]
        dropout = members[0].update.dropout  # a layer that has one is alone
        outputs = linear.lowrank_linears(
            x, [m.W0 for m in members], biases, self.A, [m.B for m in members], dropout=dropout, frozen=self.frozen
        )
        self.x, self.version, self.kept = x, x._version, dict(enumerate(outputs))

    def _forget(self) -> None:
        """Hold nothing of a step that is over."""
        self.x, self.version, self.kept = None, 0, {}
