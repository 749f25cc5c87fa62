"""Temporary files and folders beside a target, whose names say which process they are of: those of dead ones can be removed.

`.NAME.PID-RANDOM@HOST.tmp` is what is being written, or what was replaced and is being removed. `.NAME.PID-RANDOM@HOST.old` is
what stands aside between two renames, and is the only good copy where the target is missing. A temporary is locked too, as far
as the file system has locks: two containers may have one host's name, and see each other's processes by no number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deltaw.files.formats.atomic.exchange import unbroken
from deltaw.files.formats.lock import lives

log = logging.getLogger("deltaw")

# Held while temporaries of this process come into being: until they are locked, another thread could take them for leftovers
_creating = threading.Lock()


@dataclass(frozen=True)
class Leftover:
    """A temporary of some process."""

    path: Path
    pid: int
    host: str

    @property
    def aside(self) -> bool:
        """Tells a target that was moved aside from one that is being written."""
        return self.path.suffix == ".old"


@contextlib.contextmanager
def temporary(path: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a new temporary file or folder beside `path`; what has its name at the end is removed.

    What dead processes left beside `path` is removed first, or put back where nothing is at `path`.
    """
    name = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}@{_host()}.tmp")
    lock = None
    try:
        with unbroken(), _creating:
            _clear(path)
            if folder:
                name.mkdir(mode=0o700)
            else:
                name.touch(mode=0o600, exist_ok=False)
            lock = _lock(name)
        yield name
    finally:
        with unbroken():
            _remove(name)
            if lock is not None:
                os.close(lock)


def put_back(path: Path) -> None:
    """Put what a killed process moved aside back to `path`, where nothing is there now, and log that."""
    if not os.path.lexists(path):
        with _creating:
            _put_back(path, _leftovers(path))


def _put_back(path: Path, leftovers: list[Leftover]) -> None:
    aside = [leftover.path for leftover in leftovers if leftover.aside and not _is_in_use(leftover)]
    if aside and not os.path.lexists(path):
        newest = max(aside, key=lambda old: old.stat().st_mtime)
        newest.rename(path)
        log.warning("%s is back in its place: a process that was killed had moved it to %s.", path, newest.name)


def _clear(path: Path) -> None:
    leftovers = _leftovers(path)
    _put_back(path, leftovers)
    for leftover in leftovers:
        if leftover.host != _host():
            log.warning(
                "%s is of process %d on %s. If that has ended, remove it.", leftover.path, leftover.pid, leftover.host
            )
        elif not _is_in_use(leftover) and os.path.lexists(leftover.path):
            _remove(leftover.path)
            log.info("%s of a process that was killed has been removed.", leftover.path)


def _leftovers(path: Path) -> list[Leftover]:
    """Return the temporaries beside `path` that are for it."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)-[0-9a-f]{8}@(.*)\.(?:tmp|old)", re.DOTALL)
    try:
        names = sorted(other.name for other in path.parent.iterdir())
    except OSError:  # no such folder, or one that cannot be listed
        return []
    matches = (pattern.fullmatch(name) for name in names)
    return [Leftover(path.with_name(match[0]), int(match[1]), match[2]) for match in matches if match is not None]


def _is_in_use(leftover: Leftover) -> bool:
    """Return whether a process may still use it: any that lives, and any on another host."""
    others = leftover.pid != os.getpid()
    if leftover.host != _host() or (others and (os.name == "nt" or lives(leftover.pid))):
        return True
    try:
        lock = _lock(leftover.path)
    except BlockingIOError:
        return True
    if lock is not None:
        os.close(lock)
        return False
    return leftover.pid == os.getpid()


def _lock(path: Path) -> int | None:
    """Lock a file or folder until the number that is returned is closed; None where there are no such locks.

    Raises BlockingIOError for one that is locked.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _host() -> str:
    """Return this machine's name, as it stands in a file's."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", platform.node())[:40]
