"""A run's state on disk: written while the loop goes on, and read by the process that resumes it. Knows no run folders.

A state is one safetensors file with a checksum over all of it. The one before is kept too. A loop waits only for the copy of its
values; a thread hashes and writes them.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from deltaw.errors import FileError, first_line
from deltaw.files.formats.atomic import replacing
from deltaw.files.formats.checksum import checksum
from deltaw.files.formats.safetensors import read_tensors, write
from deltaw.training.loop import Loop, Saved, captured

log = logging.getLogger("deltaw")

NEWEST, BEFORE = "state.safetensors", "state.before.safetensors"
_FORMAT, _NUMBERS, _ABOUT, _SHA256 = "deltaw_state", "deltaw_numbers", "deltaw_about", "deltaw_sha256"
_VERSION = "1"

SHARE = 0.0025
"""Part of a run's time that writing its states takes, on one processor. What it takes from the others, whose threads wait for
one another at each operation, is several times that: so the loop loses less than 1%."""
AT_LEAST_EVERY = 300.0
"""Seconds between two states, at most."""
_FIRST = 5.0
"""Seconds before the first one, of which nothing is known yet."""


@dataclass(frozen=True)
class Kept:
    """A state that was read from disk."""

    saved: Saved
    about: Mapping[str, Any]
    """The run's identity and more, as its writer told it."""
    notes: tuple[str, ...] = ()
    """Sentences on newer states that were damaged."""
    path: Path | None = None
    """The file that it was read from."""


@dataclass(frozen=True)
class Place:
    """The folder that the states of one loop go to."""

    folder: Path
    about: Callable[[], Mapping[str, Any]]
    """Asked at each state for what is to stand in it about the run, as JSON holds it."""


class Keeper:
    """Writes the states of loops, all after the same step.

    Args:
        places: adapter → where its loop's states go.
        every: steps from one state to the next; by time where it is None.
        on_error: told in words, once, when a state could not be written. The loops go on.
    """

    def __init__(self, places: Mapping[str, Place], *, every: int | None, on_error: Callable[[str], None]) -> None:
        self.places, self.every, self.on_error = places, every, on_error
        self._last = time.monotonic()
        self._wait = _FIRST
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None
        self._told = False

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is not None:
            self._writing.join()  # nothing is written into a run's folder once the run has let go of it

    def __call__(self, loops: Sequence[Loop], *, now: bool) -> None:
        """Write the loops' states if it is time for that; if they must be on disk `now`, wait until they are."""
        if now or self._is_due(max(loop.state.step for loop in loops)):
            began = time.monotonic()
            self.wait()
            states = [(self.places[loop.plan.adapter], captured(loop)) for loop in loops]
            told = [(place.folder, saved, dict(place.about())) for place, saved in states]
            copied = time.monotonic() - began
            self._writing = threading.Thread(target=self._write, args=(told, copied), name="deltaw state")
            self._writing.start()
            self._last = began
        if now:
            self.wait()

    def _is_due(self, step: int) -> bool:
        if self.every is not None:
            return step > 0 and step % self.every == 0
        return time.monotonic() - self._last >= self._wait

    def _write(self, states: Sequence[tuple[Path, Saved, Mapping[str, Any]]], copied: float) -> None:
        began = time.thread_time()
        try:
            for folder, saved, about in states:
                write_state(folder, saved, about)
        except Exception as error:  # told, or raised, by the thread that trains
            self._error = error
        self._wait = min(AT_LEAST_EVERY, (copied + time.thread_time() - began) / SHARE)

    def wait(self) -> None:
        """Wait for the states that are being written, and tell of an error."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        error, self._error = self._error, None
        if error is None:
            return
        if not isinstance(error, OSError | FileError | SafetensorError):
            raise error
        if not self._told:
            self._told = True
            self.on_error(
                f"The run's state could not be written ({first_line(error)}). Training goes on; if it dies, it can only be "
                "resumed from an earlier state."
            )


def write_state(folder: Path, saved: Saved, about: Mapping[str, Any]) -> None:
    """Write a state; the newest one so far becomes the one before. A crash leaves both, or the newest as the one before.

    Raises OSError where the disk is full or the folder cannot be written.
    """
    numbers, said = json.dumps(saved.numbers), json.dumps(about, ensure_ascii=False)
    sha256 = checksum(saved.tensors, _VERSION, numbers, said)
    newest = folder / NEWEST
    with replacing(newest) as temporary:
        metadata = {_FORMAT: _VERSION, _NUMBERS: numbers, _ABOUT: said, _SHA256: sha256}
        write(temporary, saved.tensors, metadata)
        if newest.exists():
            newest.replace(folder / BEFORE)


def read_states(folder: Path) -> list[Kept]:
    """Return the states in a folder that are whole, the newest first; none where there is none.

    Raises FileError where each that is there is damaged.
    """
    problems: list[str] = []
    states: list[Kept] = []
    for path in (folder / NEWEST, folder / BEFORE):
        if not path.exists():
            continue
        try:
            states.append(_read(path))
        except FileError as error:
            problems.append(str(error))
    if problems and not states:
        raise FileError(f"No state in {folder} is whole:", problems, "Train again from the start, with --overwrite.")
    notes = tuple(
        f"{problem.rstrip('.')}. The state before it, of step {states[0].saved.step}, is used." for problem in problems
    )
    return [replace(kept, notes=notes) for kept in states]


def _read(path: Path) -> Kept:
    """Return the state in a file. Raises FileError unless it is whole."""
    tensors, metadata = read_tensors(path)
    if metadata.get(_FORMAT) != _VERSION:
        raise FileError(f"{path} is no state that this version of deltaw reads.")
    numbers, about = metadata.get(_NUMBERS, ""), metadata.get(_ABOUT, "")
    if checksum(tensors, _VERSION, numbers, about) != metadata.get(_SHA256):
        raise FileError(f"{path} is damaged: its checksum is not that of its content.")
    return Kept(Saved(tensors, json.loads(numbers)), json.loads(about), path=path)


def go_on_from(kept: Kept, folder: Path, about: Mapping[str, Any]) -> None:
    """Make a state that was read the newest one of a folder, before the loop goes on from it.

    A newer state, which is damaged or of no use, would else become the one before, and the good one would be lost.

    Args:
        kept: the state. Its file may lie in another folder.
        folder: the folder of the run that goes on.
        about: what is to stand in it about the run: other settings, for example.

    Raises:
        FileError: the folder cannot be written.
    """
    newest, before = folder / NEWEST, folder / BEFORE
    if kept.path == before:
        try:
            before.replace(newest)
        except OSError as error:
            raise FileError(f"{before} cannot take the place of {newest}: {error.strerror}.") from error
    if kept.path not in (newest, before) or kept.about != about:
        write_state(folder, kept.saved, about)
