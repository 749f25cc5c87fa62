"""With-blocks that hold for the code inside them, and for what that code starts. Knows no adapters and no models.

A block lies in the context (contextvars) of the code that opened it. So it holds for the tasks that code spawns and for
`asyncio.to_thread`, and not for other tasks, nor for plain threads. But a generator shares its caller's context, and a worker
thread may resume it in another one. So a block also belongs to the innermost frame around it that can pause: a generator's, an
asynchronous generator's, or the outermost coroutine's, which is a task's own. It holds while that frame is on the stack,
in whatever thread; while the frame is paused it does not hold for the caller. A generator that contextlib drives
(`@contextmanager`) is no such frame: it opens the block for whoever enters it.

A context may have been copied while a generator was in its block, or while it was paused there. When the generator is paused
later on, these two cannot be told apart, and a lookup from the copy is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import dis
import inspect
import sys
import threading
import weakref
from contextvars import ContextVar, Token
from types import FrameType
from typing import Any

import torch

from deltaw.errors import AdapterError

_COROUTINE = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
_GENERATES = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_PAUSES = _COROUTINE | _GENERATES

_context: ContextVar[tuple[Block, ...]] = ContextVar("deltaw_blocks", default=())
"""The open blocks of this context, the innermost last."""


class Block:
    """One block, and what is chosen in it."""

    __slots__ = (
        "__weakref__", "choice", "closed", "frame", "kept", "of", "pauses", "task", "thread", "token", "within",
    )  # fmt: skip

    def __init__(self, of: Blocks, choice: object, frame: FrameType | None, within: FrameType | None) -> None:
        self.of = of
        self.choice = choice
        self.frame = frame
        """The frame that it belongs to."""
        self.pauses = 0 if frame is None else frame.f_code.co_flags & _PAUSES
        self.thread, self.within = threading.get_ident(), within
        """The place that it was opened in: `within` is the outermost coroutine's frame."""
        self.kept: dict[tuple[str, int], Any] | None = None
        """Things that its passes keep until it is closed."""
        self.task = torch._C._current_graph_task_id()
        """Autograd's number of the backward pass that it was opened in, or −1."""
        self.closed = False
        self.token: Token[tuple[Block, ...]] | None = None
        """It tells the context that the block was opened in from others."""

    def is_here(self, within: FrameType | None) -> bool:
        """Tell if this code is in the thread and the task that opened it."""
        return self.thread == threading.get_ident() and self.within is within

    def is_over(self) -> bool:
        """Tell if it was closed, and this is the context that it was opened in: it was closed from another one. To tell
        that resets this context's blocks, which the caller sets."""
        if not self.closed or self.token is None:
            return False
        try:
            _context.reset(self.token)
        except ValueError:  # it is another context's token
            return False
        self.token = None
        return True


class Blocks:
    """The open blocks of one kind."""

    def __init__(self) -> None:
        self.open: weakref.WeakSet[Block] = weakref.WeakSet()
        self.of_frame: dict[FrameType, list[Block]] = {}
        self.pausing = False
        """A frame that can pause had one of them, ever."""
        self.lock = threading.RLock()  # a generator that is collected closes its block wherever memory is asked for

    def enter(self, choice: object) -> Block:
        """Open a block for the code that called."""
        frame, within = _owner(sys._getframe(1))
        block = Block(self, choice, frame, within)
        block.token = _context.set((*_blocks(), block))
        with self.lock:
            self.open.add(block)
            if frame is not None:
                self.pausing = True
                self.of_frame.setdefault(frame, []).append(block)
        return block

    def leave(self, block: Block) -> None:
        """Close a block, in whatever order, context and thread."""
        context, block.closed = _context.get(), True
        elsewhere = not block.is_over()
        _context.set(tuple(b for b in context if b is not block))
        with self.lock:
            self.pausing |= elsewhere
            self.open.discard(block)
            if block.frame is not None:
                self.of_frame[block.frame].remove(block)
                if not self.of_frame[block.frame]:
                    del self.of_frame[block.frame]
        block.frame = block.within = None  # they hold the code's variables

    def here(self) -> Block | None:
        """Return the block that the calling code is in. Raises AdapterError where that cannot be told."""
        return self._find()[0] if self.of_frame or _context.get() else None

    def choose(self, choice: object) -> bool:
        """Set another choice in the block that this code is in; return False where it is in none. A task or a thread that only
        has the block from the one that started it chooses for itself."""
        block, within = self._find()
        if block is None:
            return False
        if block.is_here(within) or (block.frame in self.of_frame and _on_stack(block.frame)):
            block.choice = choice
        else:
            copied = Block(self, choice, None, within)
            _context.set((*_context.get(), copied))
            with self.lock:
                self.pausing = True
                self.open.add(copied)
        return True

    def choices(self) -> list[object]:
        """List the choices of all open blocks, whoever is in them."""
        with self.lock:
            return [block.choice for block in self.open]

    def _find(self) -> tuple[Block | None, FrameType | None]:
        """Return the block that this code is in, and the outermost coroutine's frame around the code."""
        frame: FrameType | None = sys._getframe(2)
        within = None
        while frame is not None and within is None:
            if frame.f_code.co_flags & _PAUSES:
                if block := self._of(frame):
                    return block, within
                within = frame if _outermost(frame) else None
            frame = frame.f_back
        held = (b for b in reversed(_blocks()) if b.of is self and _holds(b, within))
        return next(held, None), within

    def _of(self, frame: FrameType) -> Block | None:
        """Return the innermost block that belongs to this frame. A task that has only begun runs on the stack of the one that
        spawned it, but in a context of its own."""
        blocks = self.of_frame.get(frame, ())
        if frame.f_code.co_flags & _COROUTINE:
            blocks = [block for block in blocks if block in _context.get()]
        return blocks[-1] if blocks else None


def _blocks() -> tuple[Block, ...]:
    """Return the blocks of this context, without those of its own that were closed in another one."""
    context = _context.get()
    over = [block for block in context if block.is_over()]
    if over:
        context = tuple(block for block in context if block not in over)
        _context.set(context)
    return context


def _holds(block: Block, within: FrameType | None) -> bool:
    """Tell if a block of this context, which belongs to no frame on the stack, holds for this code. Raises AdapterError."""
    if not block.pauses:
        return True
    if block.pauses & _COROUTINE:  # paused, and this is who drives it by hand; else this was started by it
        return not (within is None and block.thread == threading.get_ident() and _no_loop())
    if block.is_here(within):
        return False  # the generator is paused, and this is its caller
    frame = block.frame
    if frame is not None and frame in block.of.of_frame and (frame.f_back is not None or _awaits(frame)):
        return True
    raise AdapterError(
        "This code runs in a task or thread that was started beside a generator within a using or route block, and that "
        "generator is paused or over: whether the block is meant for this code too cannot be told. Open a using or route "
        "block in the task or thread itself."
    )


def _owner(frame: FrameType | None) -> tuple[FrameType | None, FrameType | None]:
    """Return the frame that a block opened in `frame` belongs to, and the outermost coroutine's around it."""
    owner = None
    while frame is not None:
        if _outermost(frame):
            return owner or frame, frame
        if owner is None and frame.f_code.co_flags & _GENERATES and not _entered(frame):
            owner = frame
        frame = frame.f_back
    return owner, None


def _entered(frame: FrameType | None) -> bool:
    """Tell if contextlib drives this generator, itself or through others that yield from it."""
    while frame is not None and frame.f_code.co_flags & _GENERATES:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == contextlib.__file__


def _outermost(frame: FrameType) -> bool:
    """Tell if this is a coroutine that no other one awaits: a scheduler drives it."""
    if not frame.f_code.co_flags & _COROUTINE:
        return False
    driver = frame.f_back
    return driver is None or not driver.f_code.co_flags & (_COROUTINE | inspect.CO_ASYNC_GENERATOR)


def _on_stack(wanted: FrameType | None) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def _awaits(frame: FrameType) -> bool:
    """Tell if an asynchronous generator is paused at an `await`, not at a `yield`."""
    after = next((step for step in dis.get_instructions(frame.f_code) if step.offset > frame.f_lasti), None)
    return after is not None and after.opname == "RESUME" and (after.arg or 0) & 3 == 3


def _no_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False
