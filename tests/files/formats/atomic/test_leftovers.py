"""What killed processes leave beside a target goes with the next write, and nothing of a process that lives."""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from deltaw.errors import FileError
from deltaw.files.formats import peft
from deltaw.files.formats.atomic import put_back, replacing, replacing_folder, write_text
from deltaw.files.formats.safetensors import shards_of

NO_PROCESS = 2**22 + 1  # above the largest number that Linux gives


def leftover(place: Path, *, pid: int = NO_PROCESS, host: str = platform.node(), ending: str = "tmp") -> Path:
    folder = place.with_name(f".{place.name}.{pid}-0123abcd@{host[:40]}.{ending}")
    folder.mkdir()
    (folder / "file").write_text(ending)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_dead_processes_temporaries_go_with_the_next_write_to_their_target(tmp_path: Path) -> None:
    place = tmp_path / "out [1]"
    for ending in ("tmp", "old"):
        leftover(tmp_path / "out [1]", ending=ending)
        other = leftover(tmp_path / "out", ending=ending)
        write_text(place, "new")
        assert names(tmp_path) == sorted([other.name, "out [1]"])
        (other / "file").unlink()
        other.rmdir()


def test_temporaries_of_processes_that_live_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "out"
    with replacing_folder(place) as inside, replacing(place.with_name("note")) as beside:
        with replacing_folder(place) as other:
            (other / "file").write_text("other")
        write_text(beside.with_name("note"), "")
        assert inside.is_dir() and beside.is_file()
    kept = [leftover(place, pid=os.getppid()), leftover(place, pid=NO_PROCESS, host="elsewhere")]
    write_text(place.with_name("note"), "")
    with replacing_folder(place):
        pass
    assert all((folder / "file").is_file() for folder in kept)
    assert f"{kept[1]} is of process {NO_PROCESS} on elsewhere. If that has ended, remove it." in caplog.text


def test_a_lock_counts_where_the_process_cannot_be_seen(tmp_path: Path) -> None:
    """As in another container on a machine of one name."""
    fcntl = pytest.importorskip("fcntl")
    kept = leftover(tmp_path / "out")
    handle = os.open(kept, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_text(tmp_path / "out", "")
    assert kept.is_dir()
    os.close(handle)
    write_text(tmp_path / "out", "")
    assert not kept.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    leftover(tmp_path / "out", pid=child.pid)
    write_text(tmp_path / "out", "")
    assert names(tmp_path) == ["out"]
    child.wait()


def test_the_only_good_copy_is_put_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "out"
    aside = leftover(place, ending="old")
    put_back(tmp_path / "other")
    assert aside.exists()
    with pytest.raises(ZeroDivisionError), replacing_folder(place):
        _ = 1 / 0
    assert names(tmp_path) == ["out"] and (place / "file").read_text() == "old"
    assert f"{place} is back in its place" in caplog.text and aside.name in caplog.text


def test_readers_put_it_back_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for read, name in ((peft.read, "adapter"), (shards_of, "model")):
        leftover(tmp_path / name, ending="old")
        with pytest.raises(FileError):
            read(tmp_path / name)
        assert (tmp_path / name / "file").read_text() == "old"


def test_what_is_aside_of_a_process_that_lives_is_left_to_it(tmp_path: Path) -> None:
    aside = leftover(tmp_path / "out", pid=os.getppid(), ending="old")
    put_back(tmp_path / "out")
    assert aside.exists() and not (tmp_path / "out").exists()
