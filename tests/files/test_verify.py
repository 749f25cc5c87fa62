"""Which adapter is of which base, and what a merged checkpoint is made of, by their files."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.cli import main
from deltaw.errors import BaseMismatch, FileError, MergeError
from deltaw.files.formats import peft as peft_files
from deltaw.files.formats.peft.metadata import sealed
from deltaw.files.formats.safetensors import shards_of
from deltaw.files.merge import merge_files
from deltaw.files.verify import verify_adapter, verify_merged
from tests.conftest import MAKERS, fill, tiny_llama


@pytest.fixture(params=list(MAKERS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = MAKERS[request.param]().eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = type(model).from_pretrained(tmp_path / "base")
    deltaw.attach(model, deltaw.LoRA(rank=4, alpha=6))
    fill(model)
    deltaw.save(model, tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    return tmp_path


def change(folder: Path, one: int = 0, by: float = 0.25) -> str:
    """Change an entry of a tensor of the checkpoint; its name."""
    shard = shards_of(folder)[one]
    tensors = load_file(shard.path)
    name = next(iter(tensors))
    tensors[name].view(-1)[3] += by
    save_file(tensors, shard.path)
    return name


def test_an_adapter_and_its_base(folder: Path) -> None:
    assert verify_adapter(folder / "base", folder / "adapter") == "same"
    assert verify_adapter(folder / "half", folder / "adapter") == "cast"
    assert main(["verify", str(folder / "base"), str(folder / "adapter")]) == 0


def test_an_adapter_and_other_weights(folder: Path) -> None:
    with pytest.raises(BaseMismatch, match="other base weights"):
        verify_adapter(folder / "merged", folder / "adapter")
    assert main(["verify", str(folder / "merged"), str(folder / "adapter")]) == 5


def test_an_adapter_and_two_exchanged_entries(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = next(iter(peft_files.read(folder / "adapter").factors))
    shard = next(s for s in shards_of(folder / "base") if f"{layer}.weight" in s.entries)
    tensors = load_file(shard.path)
    flat = tensors[f"{layer}.weight"].view(-1)
    flat[5], flat[77] = flat[77].clone(), flat[5].clone()
    save_file(tensors, shard.path)
    with pytest.raises(BaseMismatch, match="other base weights"):
        verify_adapter(folder / "base", folder / "adapter")
    assert main(["verify", str(folder / "base"), str(folder / "adapter")]) == 5
    assert "bit for bit" not in capsys.readouterr().out


def test_an_adapter_of_an_older_version_is_no_yes(folder: Path) -> None:
    weights = folder / "adapter" / "adapter_model.safetensors"
    old = ":".join(["0123456789abcdef" * 2] * 3)
    metadata = peft_files.read(folder / "adapter").metadata | {peft_files.W0: old}
    save_file(tensors := load_file(weights), weights, metadata=sealed(tensors, metadata))
    with pytest.raises(FileError, match="older version"):
        verify_adapter(folder / "base", folder / "adapter")


def test_an_adapter_that_names_no_base_is_no_yes(folder: Path) -> None:
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    with pytest.raises(FileError, match="cannot be told"):
        verify_adapter(folder / "base", folder / "adapter")


def test_a_merged_checkpoint(folder: Path, tmp_path: Path) -> None:
    assert verify_merged(folder / "merged", folder / "base", folder / "adapter") > 0
    words = ["verify", str(folder / "merged"), "--base", str(folder / "base"), "--adapter", str(folder / "adapter")]
    assert main(words) == 0
    with pytest.raises(MergeError, match="from base \\+ ΔW"):
        verify_merged(folder / "base", folder / "base", folder / "adapter")
    name = change(folder / "merged")
    with pytest.raises(MergeError, match=f"(?s){name}: 1 of "):
        verify_merged(folder / "merged", folder / "base", folder / "adapter")
    assert main(words) == 4


def test_tensors_that_differ_are_named_in_the_order_of_their_layers(tmp_path: Path) -> None:
    model = fill(deltaw.attach(tiny_llama(layers=11), deltaw.LoRA(rank=2, targets="q")))
    deltaw.save(model, tmp_path / "adapter")
    deltaw.detach(model).save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError) as caught:
        verify_merged(tmp_path / "base", tmp_path / "base", tmp_path / "adapter")
    assert [int(n) for n in re.findall(r"layers\.(\d+)\.", str(caught.value))] == list(range(11))


def test_the_merge_in_memory_is_verified_too_whatever_its_shards(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    deltaw.load(model, folder / "adapter")
    deltaw.merge(model)
    from deltaw.model.merging.merge import settle

    settle(model)
    model.save_pretrained(folder / "again")
    assert verify_merged(folder / "again", folder / "base", folder / "adapter") > 0
    with pytest.raises(MergeError, match="BF16"):
        verify_merged(folder / "half", folder / "base", folder / "adapter")


def test_verify_says_what_it_takes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], [str(folder / "adapter"), "--base", "x"], ["--base", "x"]):
        assert main(["verify", str(folder / "base"), *words]) == 2
        assert "deltaw verify MODEL ADAPTER" in capsys.readouterr().err
    shutil.rmtree(folder / "adapter")
    assert main(["verify", str(folder / "base"), str(folder / "adapter")]) == 5
