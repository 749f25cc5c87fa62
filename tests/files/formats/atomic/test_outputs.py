"""Outputs that would destroy an input, or what deltaw did not write."""

from pathlib import Path

import pytest

from deltaw.errors import ConfigError
from deltaw.files.formats.atomic import check_apart, check_replaceable, files_written, sign


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "model.safetensors").write_text("")
    return tmp_path / "models" / "base"


@pytest.mark.parametrize(
    ("out", "how"),
    [
        ("models/base", "it is the base"), ("models/../models/base", "it is the base"), ("link", "it is the base"),
        ("models", "it holds the base"), (".", "it holds the base"), ("models/base/out", "it lies in the base"),
        ("link/a/b", "it lies in the base"), ("models/base/model.safetensors", "it lies in the base"),
    ],
)  # fmt: skip
def test_an_output_that_is_holds_or_lies_in_an_input(
    out: str, how: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / out, out):
        for path in (base, str(base), "models/base", tmp_path / "link"):
            with pytest.raises(ConfigError, match=how):
                check_apart(place, {"the data": None, "the base": path})


def test_an_output_beside_the_inputs_and_inputs_that_are_no_paths(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in ("models/base2", "models/out", "out", base.with_name("bas")):
        check_apart(out, {"the base": base})
    check_apart("someone/model", {"the base": "someone/model", "the data": [{"text": "a"}], "the adapter": ""})


def test_all_inputs_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "data.jsonl").write_text("")
    with pytest.raises(ConfigError) as raised:
        check_apart(tmp_path / "models", {"the base": base, "the data": tmp_path / "models" / "data.jsonl"})
    assert [problem.split(",")[0] for problem in raised.value.problems] == ["it holds the base", "it holds the data"]


def test_a_folder_that_an_inputs_files_are_links_into(base: Path, tmp_path: Path) -> None:
    """As the hub's cache has them."""
    (tmp_path / "blobs").mkdir()
    (base / "model.safetensors").rename(tmp_path / "blobs" / "abc")
    (base / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    for out in ("blobs", "blobs/abc"):
        with pytest.raises(ConfigError, match="the base"):
            check_apart(tmp_path / out, {"the base": base})


def test_a_folder_is_replaced_if_it_is_empty_or_all_in_it_was_written(tmp_path: Path) -> None:
    def others(folder: Path) -> set[str] | None:
        written = files_written(folder)
        return None if written is None else {path.name for path in folder.iterdir()} - written

    out = tmp_path / "out"
    check_replaceable(out, "a merge", others)
    out.mkdir()
    check_replaceable(out, "a merge", others)
    (out / "a").write_text("")
    with pytest.raises(ConfigError, match=r"out is not replaced, since it is not a merge. In it: a. Choose"):
        check_replaceable(out, "a merge", others)
    sign(out)
    check_replaceable(out, "a merge", others)
    (out / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match=r"since more than a merge is in it, which would be lost: thesis.txt"):
        check_replaceable(out, "a merge", others)
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        check_replaceable(out / "a", "a merge", others)
