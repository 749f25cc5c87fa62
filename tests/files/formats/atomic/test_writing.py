"""Whatever happens while something is written, its place holds the old or the new, whole."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from deltaw.errors import FileError
from deltaw.files.formats.atomic import check_place, put_back, replacing, replacing_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    place = write_text(tmp_path / "sub" / "note.txt", "old")
    with pytest.raises(ZeroDivisionError), replacing(place) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert place.read_text() == "old" and names(place.parent) == ["note.txt"]
    assert write_text(place, "new ΔW").read_text(encoding="utf-8") == "new ΔW"
    assert names(place.parent) == ["note.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    for files in (["a", "b"], ["b", "c"]):
        with replacing_folder(place) as temporary:
            for name in files:
                (temporary / name).write_text(name)
        assert names(place) == files
    with pytest.raises(ZeroDivisionError), replacing_folder(place) as temporary:
        (temporary / "d").write_text("half")
        _ = 1 / 0
    assert names(place) == ["b", "c"] and names(tmp_path) == ["adapter"]


WRITER = """
import sys
from pathlib import Path
from deltaw.files.formats.atomic import replacing_folder, write_text
place = Path(sys.argv[1])
for n in range(1, 10**9):
    write_text(place / "note.txt", str(n) * 20000)
    with replacing_folder(place / "adapter") as temporary:
        for name in "ab":
            (temporary / name).write_text(str(n) * 20000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.11, 0.23, 0.37])
def test_a_killed_writer_leaves_whole_files(tmp_path: Path, after: float) -> None:
    write_text(tmp_path / "note.txt", "0" * 20000)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    while not (tmp_path / "adapter").is_dir():
        assert writer.poll() is None
        time.sleep(0.01)
    time.sleep(after)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()

    def number(text: str) -> str:
        n = text[: len(text) // 20000]
        assert text == n * 20000
        return n

    number((tmp_path / "note.txt").read_text())
    put_back(tmp_path / "adapter")  # where folders are not exchanged, the old one stood aside between two renames
    assert len({number((tmp_path / "adapter" / name).read_text()) for name in "ab"}) == 1
    write_text(tmp_path / "note.txt", "")
    with replacing_folder(tmp_path / "adapter"):
        pass
    assert names(tmp_path) == ["adapter", "note.txt"], "what the killed writer left is removed"


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from deltaw.files.formats.atomic import replacing_folder
place = Path(sys.argv[1])
try:
    for n in range(1, 10**9):
        with replacing_folder(place / "adapter") as temporary:
            for name in "ab":
                (temporary / name).write_text(str(n))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.05, 0.13, 0.21])
def test_an_interrupted_writer_leaves_the_old_or_the_new_and_nothing_else(tmp_path: Path, after: float) -> None:
    writer = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "adapter").is_dir():
        assert writer.poll() is None
        time.sleep(0.01)
    time.sleep(after)
    writer.send_signal(signal.SIGINT)
    assert writer.communicate()[0] == "interrupted\n"
    assert len({(tmp_path / "adapter" / name).read_text() for name in "ab"}) == 1 and names(tmp_path) == ["adapter"]


def test_what_cannot_be_written_is_one_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x", tmp_path / "file" / "sub" / "x"):
        with pytest.raises(FileError, match=rf"{place} cannot be written: {place.parent} is no folder"):
            write_text(place, "")
        with (
            pytest.raises(FileError, match=rf"{place} cannot be written: {place.parent} is no folder"),
            replacing_folder(place),
        ):
            pass
    with pytest.raises(FileError, match="is a file; name a folder"), replacing_folder(tmp_path / "file"):
        pass
    with pytest.raises(FileError, match=r"is a folder|Is a directory"):
        write_text(tmp_path, "")
    with (
        pytest.raises(FileError, match=r"adapter could not be written: No such file or directory \(.*none\)"),
        replacing_folder(tmp_path / "adapter"),
    ):
        (tmp_path / "sub" / "none").read_text()
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(FileError, match="note could not be written: Permission denied"):
        write_text(tmp_path / "note", "")
    tmp_path.chmod(0o755)


def save_safetensors(path: Path) -> None:
    save_file({"a": torch.ones(30000)}, path)


def save_pickle(path: Path) -> None:
    torch.save({"a": torch.ones(30000)}, path)


def save_text(path: Path) -> None:
    path.write_text("a" * 100_000)


def save_numbers(path: Path) -> None:
    with path.open("wb") as stream:
        torch.ones(30000).numpy().tofile(stream)


def save_tokenizer(path: Path) -> None:
    Tokenizer(WordLevel({f"word {i}": i for i in range(5000)}, unk_token="word 0")).save(str(path))


@pytest.mark.parametrize("write", [save_safetensors, save_pickle, save_text, save_numbers, save_tokenizer])
def test_a_full_disk_is_told_alike_whatever_writes(write: Callable[[Path], None], tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    write_text(tmp_path / "file", "old")
    write_text(tmp_path / "folder" / "file", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with (
            pytest.raises(FileError, match=r"file could not be written: (File too large|the disk is full)"),
            replacing(tmp_path / "file") as new,
        ):
            write(new)
        with (
            pytest.raises(FileError, match=r"folder could not be written: (File too large|the disk is full)"),
            replacing_folder(tmp_path / "folder") as new,
        ):
            write(new / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["file"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "old"


def test_an_error_of_another_kind_stays_as_it_is(tmp_path: Path) -> None:
    for error in (
        ValueError("no"),
        RuntimeError("no"),
        OSError("the hub is not there"),
        ConnectionResetError(104, "reset"),
    ):
        with pytest.raises(type(error)), replacing(tmp_path / "a"):
            raise error
    assert not names(tmp_path)


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_place(tmp_path / "new" / "file.json")
    for place, message in ((tmp_path / "file" / "x", "is no folder"), (tmp_path, "is a folder; name a file")):
        with pytest.raises(FileError, match=message):
            check_place(place)
