"""Which adapter the layers of a model go through: one for all, one for a thread, or one for each row of a batch. Knows
adapters by their names.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from deltaw.errors import AdapterError
from deltaw.rows import Layer, Rows

Choice = Any
"""The name of an adapter, None for the base, or Rows."""

NONE_HERE = object()
"""A thread that has chosen nothing for itself."""


class _Here(threading.local):
    """What this thread has chosen for itself."""

    choice: Choice = NONE_HERE
    block: object = None
    """The innermost block of this thread."""


class Route:
    """Which adapter the adapted layers of a model go through. One object for all of them: switching is one write.

    `active` holds for every thread; a `using` or `route` block holds for the thread that opened it, so that requests served by
    several threads do not see each other's.
    """

    __slots__ = ("active", "here", "open", "stacks")

    def __init__(self, active: str | None = None) -> None:
        self.active = active
        self.here = _Here()
        self.open: dict[object, Choice] = {}
        """The choices of all threads' open blocks."""
        self.stacks: dict[frozenset[tuple[str, int]], dict[int, Layer]] = {}
        """Of the last `route` block: how many rows each adapter had → its stacks by layer, which the next one may use again."""

    def __reduce__(self) -> tuple[type[Route], tuple[str | None]]:
        return Route, (self.active,)  # a copy is in no block and has no stacks

    def chosen(self) -> Choice:
        """What holds for this thread."""
        choice = self.here.choice
        if choice is not NONE_HERE:
            return choice
        if self.open and not torch.compiler.is_compiling() and _in_autograds_own_thread():
            self._check_backward()
        return self.active

    def choose(self, choice: Choice) -> None:
        """Switch: for all threads, or within a block of this thread for that block."""
        if self.here.choice is NONE_HERE:
            self.active = choice
        else:
            self.here.choice = self.open[self.here.block] = choice

    @contextlib.contextmanager
    def block(self, choice: Choice) -> Iterator[None]:
        """While open, this thread goes through `choice`."""
        before = self.here.choice, self.here.block
        self.here.choice, self.here.block = choice, object()
        self.open[self.here.block] = choice
        try:
            yield
        finally:
            del self.open[self.here.block]
            self.here.choice, self.here.block = before

    def rows(self, names: Sequence[str | None]) -> Rows:
        """What a block of these names goes through."""
        rows = Rows(names)
        shares = frozenset(Counter(name for name in names if name is not None).items())
        kept = self.stacks.get(shares)
        if kept is None:
            kept = {}
            self.stacks = {shares: kept}  # one write: several threads may be here
        rows.kept = kept
        return rows

    def held(self) -> set[str]:
        """The adapters that open blocks of any thread go through."""
        names: set[str] = set()
        for choice in list(self.open.values()):
            names |= set(choice.rows) if isinstance(choice, Rows) else {choice} if choice is not None else set()
        return names

    def _check_backward(self) -> None:
        """Checkpointing computes layers again in the backward pass, on a GPU in a thread of autograd's: it is in no block."""
        if any(choice != self.active for choice in list(self.open.values())):
            raise AdapterError(
                "Activations are being recomputed in a backward pass, in a thread that cannot see the using or route block "
                "that is open in another. With gradient checkpointing on a GPU, choose the adapter by use(model, name)."
            )


def _in_autograds_own_thread() -> bool:
    if torch._C._current_graph_task_id() == -1:  # not in a backward pass
        return False
    return isinstance(threading.current_thread(), threading._DummyThread)
