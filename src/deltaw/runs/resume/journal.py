"""The events of a run while it lasts, and those of a run that is resumed: one a line of log.jsonl."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from deltaw.errors import FileError
from deltaw.training.events import Event, event_from

log = logging.getLogger("deltaw")


class Journal:
    """Writes each event to log.jsonl, keeps it, and passes it on.

    Args:
        path: the log's file.
        on_event: called with each event.
        kept: bytes of the log that is there to go on after; what stands behind them was not part of the state.
    """

    def __init__(self, path: Path, on_event: Callable[[Event], None], kept: int = 0) -> None:
        self.events: list[Event] = []
        self.note = ""
        """A sentence on lines that the log has lost; empty where there are none."""
        self._path, self._on_event = path, on_event
        if kept:
            self.events, self.note = _events(path, kept)
        self._file = path.open("ab" if kept else "wb")

    def hear(self, event: Event) -> None:
        """Write an event, keep it and pass it on. Raises FileError where the disk is full."""
        self.events.append(event)
        with self._written():
            self._file.write((json.dumps(event.to_json(), ensure_ascii=False) + "\n").encode())
            self._file.flush()
        self._on_event(event)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(
                f"{self._path} could not be written: {error.strerror}. Resume the run when that is mended: it goes on from its "
                "last state."
            ) from error

    def pass_on(self, event: Event) -> None:
        """Pass on an event that is not of the log."""
        self._on_event(event)

    def position(self) -> int:
        """Return the bytes of the log so far, which are on the disk then. Raises FileError."""
        with self._written():
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `hear` has told of it
            self._file.close()


def _events(path: Path, kept: int) -> tuple[list[Event], str]:
    """Cut the log to the bytes that the state knows of, and return their events. Raises FileError for lines that are none."""
    lines = path.read_bytes()[:kept] if path.exists() else b""
    note = "" if len(lines) == kept else f"{path} has lost lines: they are missing in the log and in the report."
    whole = lines[: lines.rfind(b"\n") + 1]
    try:
        events = [event_from(json.loads(line)) for line in whole.split(b"\n")[:-1]]  # text may hold other ends of lines
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(f"{path} is no log of a run ({error}): the run cannot be resumed.") from error
    path.touch()
    with path.open("r+b") as file:
        file.truncate(len(whole))
    return events, note
