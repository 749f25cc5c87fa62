"""Write so that a crash leaves the old file or folder or the new one, never half of one, and say in one error why it failed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from deltaw.errors import FileError
from deltaw.files.formats.atomic.exchange import take_place
from deltaw.files.formats.atomic.leftovers import temporary

_FULL = "the disk is full, or a limit on a file's size is reached"
# Why something cannot be written, among the reasons that libraries in Rust give as numbers
_REASONS = ("ENOSPC", "EFBIG", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ENAMETOOLONG", "EMFILE", "ENFILE")
_NUMBERS = {number for name in _REASONS if (number := getattr(errno, name, None)) is not None}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder. On success it is synced and renamed to `path`, on an error removed.

    Raises FileError where it cannot be written: no space, no permission.
    """
    with _one_error(path):
        _make_parent(path)
        with temporary(path, folder=False) as new:
            yield new
            new.chmod(0o644)
            _sync(new)
            new.replace(path)
            _sync_names(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`. On success all its files are synced and it takes `path`'s place in one step.

    What is at `path` is removed: callers check before that this loses nothing (outputs.py). Raises FileError where the folder
    cannot be written: no space, no permission, a file at `path`.
    """
    with _one_error(path):
        if path.is_file():
            raise FileError(f"{path} is a file; name a folder.")
        _make_parent(path)
        with temporary(path, folder=True) as new:
            yield new
            new.chmod(0o755)
            for file in new.rglob("*"):
                _sync(file)
            _sync(new)
            take_place(new, path)
            _sync_names(path.parent)


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8, atomically. Return `path`. Raises FileError where it cannot be written."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
    return path


def check_place(path: Path) -> None:
    """Raise FileError when no file can be written at `path`: better before the work than after it."""
    with _one_error(path):
        _make_parent(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder; name a file.")
    if not os.access(path.parent, os.W_OK):
        raise FileError(f"{path} cannot be written: there is no permission to write into {path.parent}.")


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileError(f"{path} cannot be written: {path.parent} is no folder.") from error


@contextlib.contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Turn what systems and libraries raise where they cannot write into a FileError about `path`."""
    try:
        yield
    except Exception as error:
        reason = _reason(error, path)
        if reason is None:
            raise
        raise FileError(
            f"{path} could not be written: {reason}. What was there before is there still; nothing else was left."
        ) from error


def _reason(error: Exception, path: Path) -> str | None:
    """Say why nothing could be written; None for an error of another kind."""
    text = str(error)
    if isinstance(error, OSError):
        if isinstance(error, ConnectionError | TimeoutError):
            return None
        if error.errno is None:  # numpy's tofile, and the errors of the hub
            return _FULL if re.search(r"\d+ requested and \d+ written", text) else None
        if error.filename is None or _belongs_to(path, Path(os.fsdecode(error.filename))):
            return error.strerror
        return f"{error.strerror} ({os.fsdecode(error.filename)})"
    if isinstance(error, RuntimeError) and re.search(r"inline_container|iostream error", text):  # torch.save
        return _FULL
    number = re.search(r"\(os error (\d+)\)", text)  # safetensors, tokenizers
    return os.strerror(int(number[1])) if number is not None and int(number[1]) in _NUMBERS else None


def _belongs_to(path: Path, file: Path) -> bool:
    """Return whether a file is the target, or is or lies in a temporary of it, whose name tells users nothing."""
    start = f".{path.name}."
    return file == path or any(
        part.parent == path.parent and part.name.startswith(start) for part in (file, *file.parents)
    )


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    # Windows opens no folder, and syncs no file that was opened to read; its journal keeps renames in order
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_names(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where its owner may read them: what was written is in its place already."""
    with contextlib.suppress(OSError):
        _sync(folder)
