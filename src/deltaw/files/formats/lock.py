"""A lock on a folder, held by one process at a time. It is the system's, so it ends with the process, however that ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from deltaw.errors import FileError, FolderInUse

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


_ADVICE = "Wait for it or stop it, or choose another folder."


@contextlib.contextmanager
def locked(path: Path, doing: str) -> Iterator[str | None]:
    """Hold the lock in the file `path`, whose folder exists. The file goes when the lock does.

    Args:
        path: the lock's file.
        doing: what the process does while it holds it, for the message to another one: "is training into this folder".

    Yields:
        A sentence on a process that died while it held the lock; None where there was none.

    Raises:
        FolderInUse: another process holds it. The message has its number and machine.
        FileError: the file cannot be written.
    """
    handle, held_before = _taken(path)
    try:
        _sign(handle, path, doing)
        yield _took_over(held_before)
    finally:
        if _is_at(path, handle):
            path.unlink(missing_ok=True)
        os.close(handle)


def _sign(handle: int, path: Path, doing: str) -> None:
    """Write into the file who holds it. Raises FileError."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T"), "doing": doing}
    try:
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, json.dumps(holder).encode())
    except OSError as error:
        raise _not_writable(path, error) from error


def _is_at(path: Path, handle: int) -> bool:
    """Return whether the file still has its name: a folder that was removed meanwhile may be another process's by now."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _taken(path: Path) -> tuple[int, dict[str, object]]:
    """Return a handle of the file, with its lock, and what it says of the holder before. Raises FolderInUse and FileError."""
    while True:
        handle = _opened(path)
        held_before = _holder(handle)
        advice = _refused(handle, path)
        if advice is not None:
            os.close(handle)
            raise FolderInUse(_in_use(path, held_before, advice))
        if not _is_gone(handle):
            return handle, held_before
        os.close(handle)


def _is_gone(handle: int) -> bool:
    """Return whether its holder removed the file after we had opened it: then our lock of it shuts nobody out."""
    return sys.platform != "win32" and os.fstat(handle).st_nlink == 0


def _opened(path: Path) -> int:
    """Return a handle of the file. Raises FileError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> FileError:
    return FileError(f"{path} cannot be written ({error.strerror}): nothing was begun in {path.parent}.")


def _refused(handle: int, path: Path) -> str | None:
    """Take the system's lock of the file at once, or return what to do about it. Where a file system has no locks, the holder's
    number decides."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return _ADVICE
    except OSError:
        holder = _holder(handle)
        pid = holder.get("pid")
        here = holder.get("host") == socket.gethostname()
        if holder and not (here and not (isinstance(pid, int) and pid != os.getpid() and lives(pid))):
            return f"{_ADVICE} If it has ended (this file system has no locks that could tell), remove {path}."
    return None


def _holder(handle: int) -> dict[str, object]:
    """Return what the file says of its holder; nothing where it is empty or cut off."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        values = json.loads(os.read(handle, 4096) or b"{}")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def lives(pid: int) -> bool:
    """Return whether a process of this machine is alive. One that has ended, and that its parent has not asked for, is dead."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError, OverflowError):
        return True


def _in_use(path: Path, holder: dict[str, object], advice: str) -> str:
    who = "A process is at work here"
    if holder:
        who = f"Process {holder.get('pid')} on {holder.get('host')} {holder.get('doing')}, since {holder.get('since')}"
    return f"{path.parent} is in use. {who}. {advice}"


def _took_over(holder: dict[str, object]) -> str | None:
    if not holder:
        return None
    return f"Process {holder.get('pid')} on {holder.get('host')}, which was at work here, is dead: its lock was taken over."
