"""A run's folder: a replacement that died is finished in a copy of the folder too, and no file of others is lost."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

import deltaw
from deltaw.errors import ConfigError, FileError
from deltaw.runs.resume.place import RunFolder, at_work, finish_replacing, put_in_place
from tests.runs.test_resume import Killed


def two_runs(path: Path) -> RunFolder:
    """A run, and a whole one that is to take its place."""
    home = RunFolder(path)
    for folder, text in ((home, "old"), (home.next, "new")):
        folder.adapter.mkdir(parents=True)
        for file in (folder.adapter / "weights", folder.log, folder.result, folder.config):
            file.write_text(text)
    return home


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("moved", [0, 2])
def test_a_copy_of_a_replacement_that_died_is_finished_too(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies, and folders that were moved to another disk or restored from a backup, have other inodes."""
    home = two_runs(tmp_path / "a")
    moves, replace = iter(range(moved)), Path.replace

    def dying(self: Path, target: Path) -> Path:
        if self.parent == home.next.path and not self.name.startswith(".") and next(moves, None) is None:
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    with contextlib.suppress(Killed):
        put_in_place(home)
    monkeypatch.undo()
    copy = RunFolder(Path(shutil.copytree(home.path, tmp_path / "b")))
    for folder in (home, copy):
        finish_replacing(folder)
        assert contents(folder.path) == dict.fromkeys(("weights", "log.jsonl", "result.json", "config.yaml"), "new")


def test_what_others_put_into_next_stays(tmp_path: Path) -> None:
    home = two_runs(tmp_path)
    (home.next.path / "notes.txt").write_text("mine")
    put_in_place(home)
    assert (home.next.path / "notes.txt").read_text() == "mine" and contents(home.path)["weights"] == "new"


def test_an_out_that_cannot_be_a_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="link that leads nowhere"), at_work(RunFolder(tmp_path / "link")):
        pass
    with pytest.raises(FileError, match="Not a directory"), at_work(RunFolder(tmp_path / "file" / "run")):
        pass


def test_names_that_no_file_can_hold_are_refused_before_training(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run\udcff"
    with pytest.raises(ConfigError, match="not UTF-8"):
        deltaw.train(str(place / "model"), place / "data.jsonl", deltaw.TrainConfig(out=str(out), steps=1))
    assert not out.exists()
