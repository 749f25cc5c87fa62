"""Safetensors as they lie on disk: what is sound is read as safetensors reads it, what is not is named."""

import json
import sys
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaw.errors import FileError
from deltaw.files.formats import safetensors


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(5, 3),
        "b": torch.randn(7).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(6),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


@pytest.fixture
def path(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_every_tensor_is_read_as_it_was_written(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    shard = safetensors.read_header(path)
    assert shard.entries.keys() == tensors.keys()
    with path.open("rb") as file:
        for name, entry in shard.entries.items():
            _, found = safetensors.read_tensor(file, entry)
            assert found.dtype == tensors[name].dtype and torch.equal(found, tensors[name])


def test_rewriting_changes_what_it_is_told_and_no_other_byte(path: Path, tmp_path: Path) -> None:
    shard = safetensors.read_header(path)
    out = tmp_path / "out.safetensors"
    same = safetensors.rewrite(shard, out, {}, digest=True)
    assert out.read_bytes() == path.read_bytes() and same.before == same.after
    done = safetensors.rewrite(shard, out, {"b": lambda tensor: tensor.neg_()}, digest=True)
    entry = shard.entries["b"]
    old, new = path.read_bytes(), out.read_bytes()
    assert (
        old[: entry.start] == new[: entry.start] and old[entry.start + entry.size :] == new[entry.start + entry.size :]
    )
    assert done.before == same.before != done.after
    with path.open("rb") as before, out.open("rb") as after:
        assert torch.equal(safetensors.read_tensor(after, entry)[1], -safetensors.read_tensor(before, entry)[1])


@given(cut=st.integers(0, 10_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_refused(path: Path, cut: int) -> None:
    whole = path.read_bytes()
    short = path.with_name("short.safetensors")
    short.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(FileError, match=r"short\.safetensors"):
        safetensors.read_header(short)


@given(noise=st.binary(max_size=300))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_is_refused(tmp_path: Path, noise: bytes) -> None:
    (tmp_path / "noise.safetensors").write_bytes(noise)
    with pytest.raises(FileError, match="no sound safetensors file"):
        safetensors.read_header(tmp_path / "noise.safetensors")


def with_header(path: Path, header: object, body: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "does not begin where"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "but has 8 bytes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "tensors end at"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ({"a": 3}, "has no dtype, shape and data_offsets"),
        ([1, 2], "no sound safetensors"),
    ],
)
def test_a_header_that_does_not_fill_its_file_is_refused(tmp_path: Path, header: object, what: str) -> None:
    with pytest.raises(FileError, match=what):
        safetensors.read_header(with_header(tmp_path / "x.safetensors", header, bytes(8)))


def test_a_tensor_that_is_in_the_header_twice_is_refused(tmp_path: Path) -> None:
    """JSON's reader would take the last one, and the safetensors package does."""
    entry = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    text = f"{{{entry},{entry}}}".encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(FileError, match="'a' is in it twice"):
        safetensors.read_header(path)


def test_tensors_stay_what_they_are_when_their_file_is_overwritten_or_cut(
    path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    read, metadata = safetensors.read_tensors(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.truncate(10)
    assert metadata == {"format": "pt"} and read.keys() == tensors.keys()
    assert all(read[name].dtype == tensors[name].dtype and torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory that Linux counts")
def test_memory_goes_back_to_the_system_with_the_tensors(tmp_path: Path) -> None:
    """Also where small things are allocated in between, which hold the C library's heap."""
    save_file({"a": torch.ones(1 << 20)}, tmp_path / "a.safetensors")
    before = psutil.Process().memory_info().rss
    for _ in range(2):
        held = [safetensors.read_tensors(tmp_path / "a.safetensors") for _ in range(20)]
        loaded = psutil.Process().memory_info().rss - before
        small = [torch.ones(3000) for _ in range(100)]
        del held
        assert psutil.Process().memory_info().rss - before < 0.2 * loaded
        assert len(small) == 100


def sharded(folder: Path) -> Path:
    for name in "ab":
        save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / safetensors.INDEX).write_text(json.dumps(index))
    return folder


def test_shards_by_their_index(tmp_path: Path) -> None:
    assert [list(s.entries) for s in safetensors.shards_of(sharded(tmp_path))] == [["a"], ["b"]]


def test_every_problem_of_a_checkpoint_is_in_one_error(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "a.safetensors").write_bytes(b"nothing")
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileError) as caught:
        safetensors.shards_of(folder)
    assert "a.safetensors" in str(caught.value) and "b.safetensors" in str(caught.value)


def test_an_index_that_names_other_tensors_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    save_file({"c": torch.ones(2)}, folder / "b.safetensors")
    with pytest.raises(FileError) as caught:
        safetensors.shards_of(folder)
    assert "places b in b.safetensors" in str(caught.value) and "holds c" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": 3}}']
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / safetensors.INDEX).write_text(text)
    with pytest.raises(FileError, match=r"model\.safetensors\.index\.json"):
        safetensors.shards_of(tmp_path)


def test_a_folder_without_safetensors_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no safetensors checkpoint"):
        safetensors.shards_of(tmp_path)
    with pytest.raises(FileError, match=r"There is no folder .*nowhere"):
        safetensors.shards_of(tmp_path / "nowhere")


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    """In one process too: the package orders the metadata anew for each file."""
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.float16)}
    metadata = {f"key {i}": f'텍스트 \n \x1f " {i}' for i in range(12)}
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for i, file in enumerate(files):
        safetensors.write(file, tensors, dict(sorted(metadata.items(), reverse=bool(i % 2))))
    assert len({file.read_bytes() for file in files}) == 1
    back, there = safetensors.read_tensors(files[0])
    assert there == metadata and all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert load_file(files[0]).keys() == tensors.keys()
