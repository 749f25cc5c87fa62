"""Which dense layers of a model an adapter changes, and why it leaves others out. Reads the model, changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from deltaw.layers.names import by_family
from deltaw.methods.targets import WHERE_NAMED, left_out, role
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.weights import OnWeights

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
        if isinstance(update, OnWeights):
            names += [f"{name}.{own}" if name else own for own in update.parts]
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
