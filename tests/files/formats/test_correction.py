"""A correction file writes into its folder alone, whatever names stand in it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from deltaw.errors import FileError
from deltaw.files.formats import correction

NAMES = ["../out.txt", "/tmp/deltaw-out.txt", "a/../../out.txt", "..", ".", "", "zero\0.txt", "link/out.txt"]


def crafted(path: Path, *, written: str | None = None, added: list[str] | None = None) -> correction.Reader:
    with correction.writing(path, "hash"):
        pass
    with zipfile.ZipFile(path) as archive:
        (manifest,) = archive.namelist()
        values = json.loads(archive.read(manifest)) | {"added": added or []}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(manifest, json.dumps(values))
        if written is not None:
            archive.writestr(f"beside/{written}", b"written")
    return correction.Reader(path)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "out.txt").write_text("before")
    (tmp_path / "out.txt").write_text("before")
    (folder / "link").symlink_to(outside)
    with pytest.raises(FileError, match="outside its folder"):
        crafted(tmp_path / "added", added=[name]).put_back(folder)
    if "\0" not in name:  # a zip's own names end at a zero
        with pytest.raises(FileError, match="outside its folder"):
            crafted(tmp_path / "written", written=name).put_back(folder)
    assert (outside / "out.txt").read_text() == (tmp_path / "out.txt").read_text() == "before"
    assert not Path("/tmp/deltaw-out.txt").exists()


def test_files_within_the_folder_are_put_back(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "new.txt").write_text("of the merge")
    crafted(tmp_path / "correction", written="config.json", added=["new.txt"]).put_back(tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["config.json"]
