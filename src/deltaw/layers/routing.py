"""The choice of the adapter that a model's layers go through: one for all, one for a block, or one for each row of a batch. Knows
adapters by their names.

The choice is taken once in a pass (model/passes.py): `chosen` then gives the layers what the pass began with, whatever happens in
other threads. Activations that a backward pass computes again go through what their forward pass went through.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
import torch._C._dynamo.eval_frame

from deltaw.errors import AdapterError
from deltaw.layers.blocks import Block, Blocks
from deltaw.layers.ops.rows import Kept, Rows

Choice = Any
"""The name of an adapter, None for the base, or Rows."""

_Function = TypeVar("_Function", bound=Callable[..., object])

UNSET = object()
"""No pass of this thread has chosen."""


def natively(function: _Function) -> _Function:
    """Have torch.compile run this function, and what it calls, as it is, where it is not in the middle of what is compiled.
    (`torch.compiler.disable` would break the graph there, and takes seconds to import.)"""
    dynamo = torch._C._dynamo.eval_frame
    if hasattr(dynamo, "set_code_exec_strategy"):  # private to PyTorch; without it, layers choose for themselves
        skip = dynamo._FrameAction.SKIP
        dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
    return function


class Pass:
    """A pass in progress; or, with UNSET, a block that was opened in one."""

    __slots__ = ("choice", "frame", "kept", "of")

    def __init__(self, choice: Choice, frame: FrameType | None, kept: Kept | None, of: object) -> None:
        self.of = of
        """The module that is passed through, whole or a part; None for a block."""
        self.choice = choice
        self.frame = frame
        """One that is on the stack for as long as the pass goes on."""
        self.kept = kept

    def is_over(self) -> bool:
        """Tell if it ended without saying so: an interrupt from the keyboard passes no hook."""
        if self.frame is None:
            return False
        try:
            self.frame.clear()
        except RuntimeError:  # it is being executed
            return False
        return True


class _Here(threading.local):
    """State of this thread, set on the object: torch.compile's guards do not see a class's values change."""

    def __init__(self) -> None:
        self.choice: Choice = UNSET
        self.kept: Kept | None = None
        self.passes: list[Pass] = []
        self.came: tuple[int | None, Choice] = (None, UNSET)
        """The last backward pass that came to a pass's outputs, and what that pass went through."""
        self.plain: Choice = UNSET
        """The choice of the innermost block, where no frame that pauses has one."""


class Route:
    """The choice of the adapter that a model's adapted layers go through. One object for all of them: switching is one write.

    `active` holds for all code that is in no `using` or `route` block; layers/blocks.py says which code a block holds for.
    """

    __slots__ = ("active", "backward", "blocks", "here", "last", "running")

    def __init__(self, active: str | None = None) -> None:
        self.active = active
        self.here = _Here()
        self.blocks = Blocks()
        self.running: set[Pass] = set()
        """The passes of all threads."""
        self.last: Choice = UNSET
        """The choice that the last pass of any thread went through."""
        self.backward: dict[int, dict[int, Choice]] = {}
        """Backward passes in progress, by autograd's number → thread → what the forward pass went through."""

    def __reduce__(self) -> tuple[type[Route], tuple[str | None]]:
        return Route, (self.active,)  # a copy is in no block and no pass

    def chosen(self) -> Choice:
        """Return what the calling code goes through."""
        choice = self.here.choice
        if choice is not UNSET:
            return choice
        if torch.compiler.is_compiling():
            return self._traced()
        return self.taken()[0]

    def current(self) -> Choice:
        """Return `chosen` for code that is no layer; where all rows have one adapter, that one."""
        self.drop_stale()
        return _one(self.chosen())

    def kept(self) -> Kept | None:
        """Return the place for what is computed of adapters' tensors, which a call of `generate` keeps. None elsewhere:
        somebody may change them in between."""
        return None if torch.compiler.is_compiling() else self.here.kept

    @natively
    def taken(self) -> tuple[Choice, Block | None]:
        """Find what a pass that begins here goes through, and the block that says so."""
        block = self.blocks.here()
        choice = self.active if block is None else block.choice
        task = torch._C._current_graph_task_id()
        if task != -1 and (block is None or block.task != task):  # in a backward pass, and not in a block within it
            again = self._forward_of(task)
            if again is not UNSET:
                return again, None
            self._check_again(choice)
        return choice, block

    def choose(self, choice: Choice) -> None:
        """Set the choice: for all code in no block, or within a block for that block."""
        if not self.blocks.choose(choice):
            self.active = choice
        elif self.here.plain is not UNSET:
            self.here.plain = choice

    @contextlib.contextmanager
    def block(self, choice: Choice, kept: Kept | None = None) -> Iterator[None]:
        """Open a block, whose code goes through `choice`."""
        here, before, thread = self.here, self.here.plain, threading.get_ident()
        block = self.blocks.enter(choice)
        block.kept = kept
        here.plain = choice
        inside = self.push(None, UNSET) if here.passes else None
        try:
            yield
        finally:
            self.blocks.leave(block)
            if threading.get_ident() == thread:
                here.plain = before
            if inside is not None:
                self.pop(inside)

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """Open a block whose passes go through what holds now, and keep what they compute of adapters' tensors alone."""
        self.drop_stale()
        with self.block(self.chosen(), {}):
            yield

    def push(self, of: object, choice: Choice, frame: FrameType | None = None, kept: Kept | None = None) -> Pass:
        """Begin a pass of this thread."""
        begun = Pass(choice, frame, kept, of)
        self.here.passes.append(begun)
        self.running.add(begun)
        self.here.choice, self.here.kept = choice, kept
        return begun

    def pop(self, begun: Pass) -> None:
        """End a pass of this thread, and with it those within."""
        passes = self.here.passes
        if begun in passes:
            first = passes.index(begun)
            self.running.difference_update(passes[first:])
            del passes[first:]
            last = passes[-1] if passes else None
            self.here.choice, self.here.kept = (UNSET, None) if last is None else (last.choice, last.kept)

    @contextlib.contextmanager
    def within(self, of: object, choice: Choice) -> Iterator[None]:
        """Open a block in which what this thread computes in the module `of` goes through `choice`, as a part of the pass in
        progress."""
        begun = self.push(of, choice, None, self.here.kept)
        try:
            yield
        finally:
            self.pop(begun)

    def drop_stale(self) -> None:
        """Forget passes of this thread that were interrupted."""
        stale = next((begun for begun in self.here.passes if begun.is_over()), None)
        if stale is not None:
            self.pop(stale)

    def held(self) -> set[str]:
        """Return the adapters that open blocks, and passes in progress, go through."""
        choices = self.blocks.choices() + [begun.choice for begun in list(self.running) if not begun.is_over()]
        return {name for choice in choices for name in names_of(choice)}

    def _traced(self) -> Choice:
        """Return `chosen` where torch.compile reads along, and no hook of the model's ran before: it cannot read frames."""
        if self.blocks.pausing:
            return self.taken()[0]  # which it breaks its graph for
        return self.active if self.here.plain is UNSET else self.here.plain

    def _forward_of(self, task: int) -> Choice:
        """Find what the forward pass of this backward pass went through; UNSET if that did not say."""
        threads = self.backward.get(task)
        if threads is None:  # a backward pass within one, as reentrant checkpointing has
            outer, choice = self.here.came
            return choice if outer in self.backward else UNSET
        if threading.get_ident() in threads:
            return threads[threading.get_ident()]
        one, *others = threads.values()
        return one if all(other == one for other in others) else UNSET

    def _check_again(self, choice: Choice) -> None:
        """Raise AdapterError where activations are computed again before the backward pass comes to the outputs of a pass, in
        code that is not where that pass was."""
        choice = _one(choice)
        if self.last is not UNSET and self.last != choice:
            raise AdapterError(
                "Activations are computed again in a backward pass, and what their forward pass went through cannot be told: the "
                f"last pass went through {_said(self.last)}, this code goes through {_said(choice)}. Leave the using or route "
                "block after the backward pass; with gradient checkpointing on a GPU, switch by use(model, name)."
            )


def _one(choice: Choice) -> Choice:
    """Return the one adapter that all rows have, if they do; else the choice."""
    return choice.names[0] if isinstance(choice, Rows) and choice.alike else choice


def _said(choice: Choice) -> str:
    if isinstance(choice, Rows):
        return "an adapter for each row"
    return "the base" if choice is None else f"adapter {choice!r}"


def names_of(choice: Choice) -> set[str]:
    """Return the adapters that a choice names."""
    if isinstance(choice, Rows):
        return set(choice.rows)
    return {choice} if isinstance(choice, str) else set()
