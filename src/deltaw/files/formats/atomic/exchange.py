"""A folder in the place of another one, so that no instant has neither."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

log = logging.getLogger("deltaw")

# renameat2 of Linux (linux/fs.h, fcntl.h) and renamex_np of macOS (sys/stdio.h)
_RENAME_EXCHANGE, _AT_FDCWD, _RENAME_SWAP = 2, -100, 2


def exchange(one: Path, other: Path) -> bool:
    """Exchange what two paths name, in one step. Return False where the system or the file system cannot do that."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return not library.renamex_np(*names, ctypes.c_uint(_RENAME_SWAP))
        here = ctypes.c_int(_AT_FDCWD)
        return not library.renameat2(here, names[0], here, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    except (
        AttributeError,
        OSError,
        TypeError,
    ):  # a system without the call; Windows has no library of that name either
        return False


def take_place(new: Path, path: Path, exchange: Callable[[Path, Path], bool] = exchange) -> None:
    """Rename a folder to `path`. What was there has the name `new` then, and is the caller's to remove.

    Without an exchange the old one stands aside between two renames, under `new`'s name with the ending .old.
    """
    if not os.path.lexists(path):
        new.rename(path)
        return
    with unbroken():
        if exchange(new, path):
            return
        aside = new.with_suffix(".old")
        path.rename(aside)
        try:
            new.rename(path)
        except OSError:
            log.error("%s stands aside as %s.", path, aside)  # true also if the next rename fails
            aside.rename(path)
            log.error("%s is back in its place.", path)
            raise
        aside.rename(new)


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Let signals such as Ctrl-C wait for the end of a few steps. (Python hands them to the main thread alone.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    # None stands for a handler that was not set by Python, and cannot be put back
    before = {n: h for n in (signal.SIGINT, signal.SIGTERM) if (h := signal.getsignal(n)) is not None}
    try:
        for number in before:
            signal.signal(number, wait)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for came in waiting:
            signal.raise_signal(came)
