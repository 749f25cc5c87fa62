"""The lock of a folder: removed folders, full disks, and file systems without locks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from deltaw.errors import FileError, FolderInUse
from deltaw.files.formats.lock import locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")


def refused(*arguments: object) -> None:
    raise OSError(errno.ENOTSUP, "not supported")


def test_a_lock_that_is_another_processes_by_now_stays(tmp_path: Path) -> None:
    """The folder was removed while it was in use, and made anew."""
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    with locked(lock, "was first"):
        shutil.rmtree(lock.parent)
        lock.parent.mkdir()
        with locked(lock, "is second"):
            pass
        second = locked(lock, "is second")
        second.__enter__()
    with pytest.raises(FolderInUse, match="is second"), locked(lock, "is third"):
        pass
    second.__exit__(None, None, None)
    assert not lock.exists()


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(FileError, match="No space left"), locked(tmp_path / ".lock", "works"):
        pass
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(("pid", "host"), [(4242, "there"), (1, socket.gethostname())], ids=["host", "number"])
def test_without_locks_of_the_file_system_it_is_said_what_to_remove(
    pid: int, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process on another machine, or a number that another process has by now, can be told from neither."""
    import fcntl

    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": pid, "host": host, "since": "then", "doing": "works"}))
    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(FolderInUse, match=rf"Process {pid} .* If it has ended .* remove .*\.lock"), locked(lock, "x"):
        pass
