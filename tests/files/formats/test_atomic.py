"""Whatever happens while something is written, its place holds the old or the new, whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltaw.errors import FileError
from deltaw.files.formats.atomic import check_place, replacing, replacing_folder, write_text


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
    kept = tmp_path / "adapter"
    if not kept.is_dir():  # between the two renames the old folder stands aside, whole
        (kept,) = tmp_path.glob(".adapter.*.old/adapter")
    assert len({number((kept / name).read_text()) for name in "ab"}) == 1


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_place(tmp_path / "new" / "file.json")
    for place, message in ((tmp_path / "file" / "x", "is no folder"), (tmp_path, "is a folder; name a file")):
        with pytest.raises(FileError, match=message):
            check_place(place)
