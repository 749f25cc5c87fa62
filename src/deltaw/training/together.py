"""Adapted layers that read the same tensor (q, k, v; gate, up) computed as one, while the model's code goes on calling them one
by one: the first of them to be called computes the outputs of all and keeps the others' until they are asked for. Knows
layers and their updates, nothing of losses or optimizers.

Which layers belong together is seen in one forward pass. Should one of a group then be called with another tensor, it is
computed alone, and from there on so are all of that group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from deltaw.layers.ops import linear
from deltaw.methods.updates.lowrank import LowRank

Branch = Callable[[Any, Tensor], Tensor]
"""Layer and x → the layer's output with its update."""


@contextlib.contextmanager
def elsewhere(updates: Mapping[str, LowRank], branches: Mapping[str, Branch]) -> Iterator[None]:
    """While open, the branches of these layers are computed by these functions."""
    try:
        for name, branch in branches.items():
            updates[name].elsewhere = branch
        yield
    finally:
        for name in branches:
            updates[name].elsewhere = None


def same_input(updates: Mapping[str, LowRank], forward: Callable[[], Any]) -> list[list[str]]:
    """The names of `updates` in groups: layers called one after the other with the same tensor in `forward`. Layers that were
    called twice or never, or that drop out entries of x of their own, are alone."""
    calls: list[tuple[str, Tensor, int]] = []

    def note(name: str, layer: Any, x: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class Member:
    """One layer of a group: its rows of the group's A, which are scaled already, and its B [d, r]."""

    layer: Any
    update: LowRank
    rows: slice
    B: Tensor

    @property
    def W0(self) -> Tensor:
        return self.update.W0(self.layer)


class _Part(NamedTuple):
    """What a kind's branch asks of an update."""

    A: Tensor
    B: Tensor
    dropout: float
    scale: float = 1.0
    training: bool = True


class Together:
    """A group of layers in training; `branch` computes each. A [Σr, k] is the members' A's, stacked in order."""

    def __init__(self, A: Tensor, members: Sequence[Member]) -> None:
        self.A = A
        self.members = members
        self.one = len(members) > 1
        self.kept: dict[int, Tensor] = {}
        self.x: Tensor | None = None
        self.version = 0

    def branch(self, place: int, layer: Any, x: Tensor) -> Tensor:
        """The output of the member in this place."""
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
        return member.update.kind.branch(member.layer, x, part, member.layer.bias)

    def _compute(self, x: Tensor) -> None:
        members = self.members
        biases = [m.layer.bias for m in members]
        outputs = linear.lowrank_linears(x, [m.W0 for m in members], biases, self.A, [m.B for m in members])
        self.x, self.version, self.kept = x, x._version, dict(enumerate(outputs))

    def _forget(self) -> None:
        """Hold nothing of a step that is over."""
        self.x, self.version, self.kept = None, 0, {}
