"""The checksum in an adapter's file: every writer writes a right one, and every reader finds what has changed."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.errors import FileError
from deltaw.files.formats import peft
from deltaw.files.formats.peft.metadata import CHECKSUM, is_ours, sealed
from deltaw.files.verify import verify_adapter
from tests.conftest import assert_same, fill, snapshot, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters of it of several methods."""
    folder = tmp_path_factory.mktemp("sealed")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder / "base")
    for name, method in (("lora", deltaw.LoRA(rank=2, targets="qv")), ("ia3", deltaw.IA3())):
        torch.manual_seed(0)
        deltaw.save(fill(deltaw.attach(tiny_llama(), method)), folder / name)
    return folder


def copied(folder: Path, name: str, to: Path) -> Path:
    shutil.copytree(folder / name, to / name)
    return to / name


def metadata_of(adapter: Path) -> dict[str, str]:
    with safe_open(adapter / peft.WEIGHTS, "pt") as file:
        return file.metadata()


def readers(folder: Path, adapter: Path, out: Path) -> dict[str, object]:
    return {
        "load": lambda: deltaw.load(tiny_llama(), adapter, check_base=False),
        "merge": lambda: deltaw.merge_files(folder / "base", adapter, out),
        "spectrum": lambda: deltaw.spectrum(adapter),
        "compress": lambda: deltaw.compress(adapter, out, rank=1),
        "convert": lambda: deltaw.convert(adapter, out.with_suffix(".pt")),
        "verify": lambda: verify_adapter(folder / "base", adapter),
    }


@pytest.mark.parametrize("reader", ["load", "merge", "spectrum", "compress", "convert", "verify"])
def test_a_flipped_bit_is_found_by_every_reader(folder: Path, reader: str, tmp_path: Path) -> None:
    adapter = copied(folder, "lora", tmp_path)
    raw = bytearray((adapter / peft.WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (adapter / peft.WEIGHTS).write_bytes(raw)
    with pytest.raises(FileError, match=r"adapter_model\.safetensors is damaged"):
        readers(folder, adapter, tmp_path / "out")[reader]()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_no_flipped_bit_is_taken(folder: Path, name: str, tmp_path: Path) -> None:
    adapter, random, model = copied(folder, name, tmp_path), Random(0), tiny_llama()
    raw, before = (adapter / peft.WEIGHTS).read_bytes(), snapshot(model)
    for _ in range(150):
        damaged = bytearray(raw)
        damaged[random.randrange(len(raw))] ^= 1 << random.randrange(8)
        (adapter / peft.WEIGHTS).write_bytes(damaged)
        try:
            deltaw.load(model, adapter, check_base=False)
        except FileError:
            assert_same(model, before)
        else:  # "format" and blanks in the header mean nothing
            assert damaged[8 : 8 + int.from_bytes(raw[:8], "little")] != raw[8 : 8 + int.from_bytes(raw[:8], "little")]
            deltaw.detach(model)


def test_two_tensors_of_one_shape_that_were_exchanged_are_found(folder: Path, tmp_path: Path) -> None:
    adapter = copied(folder, "lora", tmp_path)
    tensors = load_file(adapter / peft.WEIGHTS)
    one, other = [key for key in tensors if key.endswith("q_proj.lora_A.weight")]
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, adapter / peft.WEIGHTS, metadata=metadata_of(adapter))
    with pytest.raises(FileError, match="is damaged"):
        peft.read(adapter)


@pytest.mark.parametrize("key", ["deltaw_w0", "deltaw_version", CHECKSUM])
def test_changed_metadata_are_found(folder: Path, key: str, tmp_path: Path) -> None:
    adapter, tensors = copied(folder, "lora", tmp_path), load_file(folder / "lora" / peft.WEIGHTS)
    for changed in ({key: metadata_of(adapter)[key][:-1] + "f."}, {key + "x": metadata_of(adapter)[key]}):
        metadata = {k: v for k, v in metadata_of(folder / "lora").items() if k != key} | changed
        save_file(tensors, adapter / peft.WEIGHTS, metadata=metadata)
        with pytest.raises(FileError, match="damaged"):
            peft.read(adapter)


def test_a_file_without_a_checksum_is_read_as_it_is(folder: Path, tmp_path: Path) -> None:
    adapter = copied(folder, "lora", tmp_path)
    expected, tensors = peft.read(adapter), load_file(adapter / peft.WEIGHTS)
    older = {key: text for key, text in metadata_of(adapter).items() if key != CHECKSUM}
    for metadata in (older, None):  # of a build before, and of PEFT
        save_file(tensors, adapter / peft.WEIGHTS, metadata=metadata)
        file = peft.read(adapter)
        assert file.scales == expected.scales and file.ours == (metadata is not None)


def test_what_rewrites_an_adapter_writes_a_right_checksum(folder: Path, tmp_path: Path) -> None:
    foreign = copied(folder, "lora", tmp_path)
    save_file(load_file(foreign / peft.WEIGHTS), foreign / peft.WEIGHTS)
    deltaw.compress(folder / "lora", tmp_path / "small", rank=1)
    deltaw.compress(foreign, tmp_path / "small foreign", rank=1)
    deltaw.convert(folder / "lora", tmp_path / "lora.pt", alpha=2)
    deltaw.convert(tmp_path / "lora.pt", tmp_path / "converted", alpha=2)
    model = tiny_llama()
    deltaw.load(model, folder / "lora", check_base=False)
    deltaw.save(model, tmp_path / "again")
    for name in ("small", "small foreign", "converted", "again"):
        metadata = metadata_of(tmp_path / name)
        tensors = load_file(tmp_path / name / peft.WEIGHTS)
        assert metadata[CHECKSUM] == sealed(tensors, metadata)[CHECKSUM]
        peft.read(tmp_path / name)
    assert not is_ours(metadata_of(tmp_path / "small foreign"))  # what its settings mean is still PEFT's


def test_an_adapter_whose_steps_changed_nothing_is_refused(tmp_path: Path) -> None:
    model = deltaw.attach(tiny_llama(), deltaw.LoRA(rank=2))
    before = snapshot(other := tiny_llama())
    deltaw.save(model, tmp_path / "lost", training={"steps_taken": 40})
    with pytest.raises(FileError, match="has no effect: its file says that 40 steps were taken"):
        deltaw.load(other, tmp_path / "lost", check_base=False)
    assert_same(other, before)
    for name, training in (("fresh", {"steps_taken": 0}), ("no claim", {"form": "prompt"})):
        deltaw.save(model, tmp_path / name, training=training)
        deltaw.load(other, tmp_path / name, name=name, check_base=False)


def test_duplicate_and_deep_json_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = copied(folder, "lora", tmp_path)
    path = adapter / peft.CONFIG
    text = path.read_text()
    for changed in (
        text.replace('"r": 2', '"r": 2, "r": 2'),
        text.replace('"r": 2', '"x": ' + "[" * 5000 + "]" * 5000 + ', "r": 2'),
    ):
        path.write_text(changed)
        with pytest.raises(FileError, match="cannot be read as JSON"):
            peft.read(adapter)


@pytest.mark.parametrize("settings", [
    {"target_modules": "(a+)+$"}, {"rank_pattern": {"((.*)*)*z": 4}}, {"modules_to_save": ["a)|(b"], "target_modules": "(a*)*b"},
    {"lora_alpha": 10**400}, {"lora_dropout": 10**400}, {"lora_alpha": 1e300}, {"trainable_token_indices": [2**64]},
    {"alpha_pattern": {"(a)\\2": 2}}, {"layers_to_transform": [0], "layers_pattern": "a|b("},
], ids=str)  # fmt: skip
def test_settings_that_cannot_be_used_are_one_error(folder: Path, settings: dict[str, object], tmp_path: Path) -> None:
    adapter = copied(folder, "lora", tmp_path)
    save_file(load_file(adapter / peft.WEIGHTS), adapter / peft.WEIGHTS)
    path = adapter / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if "rank_pattern" in settings:  # it matches nothing, and that is found soon
        assert set(peft.read(adapter).scales.values()) == {peft.read(folder / "lora").scales.popitem()[1]}
        return
    with pytest.raises(FileError):
        peft.read(adapter)


@pytest.mark.parametrize("kind", ["meta", "sparse", "complex", "expanded", "key", "int8"])
def test_pickled_tensors_that_are_no_values_are_refused(folder: Path, kind: str, tmp_path: Path) -> None:
    adapter = copied(folder, "lora", tmp_path)
    tensors = dict(load_file(adapter / peft.WEIGHTS))
    key = next(iter(tensors))
    wrong = {
        "meta": tensors[key].to("meta"), "sparse": tensors[key].to_sparse(), "complex": tensors[key].to(torch.complex64),
        "expanded": torch.zeros(1).expand(1 << 20, 1 << 20), "int8": tensors[key].to(torch.int8),
    }  # fmt: skip
    changed = tensors | ({3: tensors[key]} if kind == "key" else {key: wrong[kind]})
    (adapter / peft.WEIGHTS).unlink()
    torch.save(changed, adapter / peft.PICKLED)
    with pytest.raises(FileError, match="cannot be used"):
        peft.read(adapter)
