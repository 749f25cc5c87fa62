"""Signals that ask a process to end: the run saves its state first, and ends with the code that schedulers expect."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from deltaw import progress
from deltaw.errors import Interrupted

_ASKING = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
"""An operation of Linux's prctl."""


class Stopping:
    """The signal that asked this process to end, once there is one."""

    signum = 0

    def __call__(self) -> bool:
        return bool(self.signum)

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as a shell tells it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signum or signal.SIGINT)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Stopping]:
    """Note, while open, the first Ctrl-C or SIGTERM, for the loop to stop after its step. A second one interrupts at once.

    Outside of the main thread nothing changes: signals do not arrive there.
    """
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        if stopping.signum:
            raise KeyboardInterrupt
        stopping.signum = signum
        progress.tell(progress.Stopping())

    previous = {signum: signal.signal(signum, ask) for signum in _ASKING}
    try:
        yield stopping
    except KeyboardInterrupt:
        if stopping.signum != signal.SIGTERM:
            raise
        raise Interrupted("Stopped at once, since a second signal came.", exit_code=stopping.exit_code) from None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def end_with_the_parent() -> None:
    """On Linux, ask this process to end when the one that started it does: it saves its state then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
