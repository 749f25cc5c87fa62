"""A batch whose rows have adapters of their own: which rows each adapter has, and a layer's A's and B's in stacks.

Knows updates by their A, B, scale and dropout; no models.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from deltaw.errors import AdapterError
from deltaw.layers.ops import batched
from deltaw.layers.ops.batched import Order, Stack
from deltaw.layers.ops.row_forms import Form, Named

Kept = dict[tuple[str, int], Any]
"""Tensors that a call of `generate` caches, computed from adapters' tensors: (name of what it is, an object's id) → tensor."""


class Update(Protocol):
    """The parts of an update that a batch needs. A stackable update has all of them; others have a branch."""

    @property
    def stackable(self) -> bool:
        """Rows with updates of one rank can be computed as one product with their stacked A's and B's."""

    @property
    def A(self) -> Tensor:
        """[r, k]"""

    @property
    def B(self) -> Tensor:
        """[d, r]"""

    @property
    def rank(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def training(self) -> bool: ...
    def branch(self, layer: nn.Module, /, *inputs: Any, **named: Any) -> Any:
        """Return the layer's output with this update."""


@dataclass(frozen=True)
class Layer:
    """The stacks of one layer, for outputs of one dtype."""

    stacks: list[Stack]
    members: tuple[tuple[str, ...], ...]
    """Names of each stack's adapters."""
    singly: tuple[str, ...]
    """Adapters whose updates cannot be stacked: each is computed on its own rows."""
    dtype: torch.dtype
    learns: bool
    """Gradients flow into its stacks."""


class Rows:
    """An adapter, or none, for each row of a batch. While `generate` computes several beams or sequences of a row, these lie one
    after the other: a batch of m·n rows for n names is then read as m rows of each."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            if name is not None:
                self.rows.setdefault(name, []).append(row)
        self.alike = len(set(self.names)) == 1
        """All rows have the first one's adapter."""
        self.orders: dict[tuple[torch.device, tuple[tuple[str, ...], ...]], Order] = {}
        self.form: Form | None = None
        """The batch of the pass that these rows are of, where that is known."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self.names == other.names

    def __hash__(self) -> int:
        return hash(self.names)

    def of_batch(self, x: Tensor, dimensions: int, named: Named, placeholders: frozenset[int]) -> Rows | str | None:
        """Give what a model with main input x among its inputs `named` goes through: these rows, with the batch's form, or the
        one adapter that all of them have. Raises AdapterError as `check` does."""
        self.check(x, dimensions)
        if self.alike:
            return self.names[0]
        rows = copy.copy(self)
        rows.form = Form(x, named, len(self.names), placeholders)
        return rows

    def check(self, x: Tensor, dimensions: int) -> None:
        """Raise AdapterError for an input of another number of rows, or with fewer dimensions than one with rows has."""
        n = len(self.names)
        if x.dim() >= dimensions and (x.shape[0] == n or (x.shape[0] % n == 0 and _is_expanded(n))):
            return
        raise self._other_rows(x)

    def _other_rows(self, x: Tensor) -> AdapterError:
        n, here = len(self.names), f"The route names {len(self.names)} row{'s'[: len(self.names) != 1]}"
        if any(_is_guided(values) for values in _generating()):
            return AdapterError(
                f"{here}, and guidance computes each row with and without its condition: use one adapter at a time, or "
                "guidance_scale=1."
            )
        return AdapterError(
            f"{here}, but a layer's input is {list(x.shape)}: its first dimension must be {n}, the batch's. Give route one name "
            "for each row of the batch."
        )

    def through(
        self, module: nn.Module, updates: Mapping[str, Update], x: Tensor, out: Tensor, kept: Kept | None = None
    ) -> Tensor:
        """Return the output of a layer, of which `out` [..., d] is the base's part and x [..., k] the input, with each row's
        branch. `kept` may have the layer's stacks. Raises AdapterError where the rows of the batch cannot be told."""
        n = len(self.names)
        if not x.numel():  # no token of this batch came here
            return out
        if x.dim() < 2 or x.shape[0] % n or out.shape[0] != x.shape[0]:
            raise self._other_rows(x)
        layer = None if kept is None else kept.get(("stacks", id(updates)))
        if layer is None or layer.dtype != out.dtype:
            layer = self._stacked(updates, out)
            if kept is not None and not layer.learns:
                kept["stacks", id(updates)] = layer
        if layer.stacks:
            (*_, d), (*_, k) = out.shape, x.shape
            order = self._order(layer, out.device)
            flat = batched.add_branches(out.reshape(n, -1, d), x.reshape(n, -1, k), layer.stacks, order)
            out = flat.view(out.shape)
        for name in layer.singly:
            out = self._placed(name, updates[name].branch(module, self._of(name, x)), out)
        return out

    def by_tokens(
        self,
        module: nn.Module,
        updates: Mapping[str, Update],
        plain: Callable[..., Tensor],
        inputs: Sequence[object],
        named: Mapping[str, object],
    ) -> Tensor:
        """Return the output of a mixture's experts, whose inputs are tokens and what a router chose for each, [T, …] in the
        batch's order: each adapter's tokens, and those of the base, go through its own experts. `plain` computes the base's.
        Raises AdapterError for other inputs."""
        n, values = len(self.names), [v for v in (*inputs, *named.values()) if isinstance(v, Tensor) and v.dim()]
        tokens = _tokens(values) if len(values) == len(inputs) + len(named) else None
        if tokens is None or tokens % n or any(value.shape[0] % n for value in values) or len(values) == 1:
            raise AdapterError(
                f"A {type(module).__name__} is not given each token of a batch of {n} rows and what a router chose for it: "
                "its rows cannot have adapters of their own. Adapters that leave it out (for example targets='attention') can be "
                "mixed in a batch."
            )
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(self.names):
            rows.setdefault(name if name in updates else None, []).append(row)
        parts = []
        for name, members in rows.items():
            taken = [value.reshape(n, -1, *value.shape[1:])[members].flatten(0, 1) for value in values]
            forward = plain if name is None else partial(updates[name].branch, module)
            out = forward(*taken[: len(inputs)], **dict(zip(named, taken[len(inputs) :], strict=True)))
            parts.append(out.reshape(len(members), -1, *out.shape[1:]))
        order = torch.tensor([row for members in rows.values() for row in members]).argsort().to(parts[0].device)
        return torch.cat(parts)[order].flatten(0, 1)

    def _of(self, name: str, x: Tensor) -> Tensor:
        """Return the rows of a batch that this adapter has."""
        n = len(self.names)
        return x.reshape(n, -1, *x.shape[1:])[self.rows[name]].flatten(0, 1)

    def _placed(self, name: str, of_rows: Tensor, out: Tensor) -> Tensor:
        """Return `out` with this adapter's rows in it."""
        if of_rows.shape[1:] != out.shape[1:]:
            raise AdapterError(
                f"Adapter {name!r} has another vocabulary than the base ({of_rows.shape[-1]} tokens, not {out.shape[-1]}): its "
                "rows cannot be in one batch with others. Use it by itself."
            )
        rows = torch.tensor(self.rows[name], device=out.device)
        flat = out.reshape(len(self.names), -1)
        return flat.index_copy(0, rows, of_rows.reshape(len(rows), -1)).view(out.shape)

    def _stacked(self, updates: Mapping[str, Update], out: Tensor) -> Layer:
        """Return the layer's stacks, and the adapters that are in none."""
        groups = self._groups(updates)
        singly = tuple(name for name in self.rows if name in updates and not updates[name].stackable)
        parameters = [t for names in groups for name in names for t in (updates[name].A, updates[name].B)]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in parameters)
        # Not under inference mode: a later pass may want gradients of x
        with torch.inference_mode(False), torch.set_grad_enabled(learns):
            stacks = [_stack([updates[name] for name in names], out.dtype) for names in groups]
        return Layer(stacks, groups, singly, out.dtype, learns)

    def _groups(self, updates: Mapping[str, Update]) -> tuple[tuple[str, ...], ...]:
        """Return the adapters that can be one stack, group by group, in the order of their names."""
        groups: dict[tuple[int, int, torch.dtype, float], list[str]] = {}
        for name in sorted(self.rows):
            update = updates.get(name)
            if update is not None and update.stackable:
                key = update.rank, len(self.rows[name]), update.A.dtype, _dropout(update)
                groups.setdefault(key, []).append(name)
        return tuple(tuple(group) for group in groups.values())

    def _order(self, layer: Layer, device: torch.device) -> Order:
        key = device, layer.members
        if key not in self.orders:
            rows = [[row for name in names for row in self.rows[name]] for names in layer.members]
            self.orders[key] = batched.order(rows, len(self.names), device)
        return self.orders[key]


def _tokens(values: Sequence[Tensor]) -> int | None:
    """Return the one number of tokens T of these inputs, [T, …], [T] or [B, L, …] with B·L = T; None where there are several."""
    tokens = {value.shape[0] * (value.shape[1] if value.dim() == 3 else 1) for value in values}
    flat = {value.shape[0] for value in values}
    return flat.pop() if len(flat) == 1 else tokens.pop() if len(tokens) == 1 else None


def _is_expanded(n: int) -> bool:
    """Tell if transformers' `generate`, of whatever model, is waiting for this code and was given n prompts: more rows than these
    are then its own, those of a prompt one after the other. Its own variable says how many there are; where it has none, that is
    not known and taken for true. Guidance puts all prompts' rows without a condition behind those with one: False."""
    waiting = list(_generating())
    if any(_is_guided(values) for values in waiting):
        return False
    told = [count for values in waiting if isinstance(count := values.get("batch_size"), int)]
    return n in told if told else bool(waiting)


def _generating() -> Iterator[Mapping[str, object]]:
    """Yield the variables of each of transformers' `generate` that waits for this code, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and str(frame.f_globals.get("__name__")).startswith("transformers"):
            yield frame.f_locals
        frame = frame.f_back


def _is_guided(values: Mapping[str, object]) -> bool:
    """Return whether a `generate` with these variables computes each row twice, with and without its condition, in one batch."""
    processors = [
        type(p).__name__ for value in values.values() if isinstance(value, LogitsProcessorList) for p in value
    ]
    return any("ClassifierFreeGuidance" in name and not name.startswith("Unbatched") for name in processors)


def _stack(updates: Sequence[Update], dtype: torch.dtype) -> Stack:
    """Return the stack of updates of one rank and dtype, for a layer that computes in `dtype`.

    It is in the updates' dtype where that is narrower: it was asked for, and is less to read. (But for 8 bits, which have no
    products.)
    """
    first, *_ = updates
    stored = first.A.dtype
    working = stored if 1 < stored.itemsize < dtype.itemsize else dtype
    A, B = batched.stacked([u.A for u in updates], [u.B for u in updates], [u.scale for u in updates], working)
    return Stack(A, B, _dropout(first))


def _dropout(update: Update) -> float:
    """Return the share that an update drops of its input now."""
    return update.dropout if update.training else 0.0
