"""Merging on disk: the bits of a merge in memory, and the base's bytes back."""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Model

import deltaw
from deltaw.errors import FileError, MergeError
from deltaw.files import merge
from deltaw.files.formats import correction
from deltaw.files.formats.locate import NotByFiles
from deltaw.files.formats.safetensors import INDEX
from deltaw.files.verify import verify_merged
from tests.conftest import MAKERS, fill

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def checkpoint(make: Any, dtype: torch.dtype, folder: Path, method: Any = deltaw.LoRA(rank=4, alpha=6)) -> Path:  # noqa: B008
    """A model folder of several shards, and beside it an adapter of the model."""
    torch.manual_seed(1)
    model = make().to(dtype).eval()
    model.save_pretrained(folder / "base", max_shard_size="30KB")
    (folder / "base" / "notes.txt").write_text("goes along")
    (folder / "base" / "pytorch_model.bin").write_bytes(b"stale")
    deltaw.attach(model, method)
    fill(model)
    deltaw.save(model, folder / "adapter")
    return folder


@pytest.fixture(params=list(MAKERS))
def llama_or_gpt2(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix != ".bin"}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if ".deltaw." not in n}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merge_on_disk_is_the_merge_in_memory_bit_for_bit(
    llama_or_gpt2: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = checkpoint(llama_or_gpt2, dtype, tmp_path)
    done = merge.merge_files(folder / "base", folder / "adapter", folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    deltaw.load(model, folder / "adapter")
    report = deltaw.merge(model)
    found = weights(AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=dtype))
    expected = weights(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], w) for n, w in expected.items())
    assert done.layers.keys() == report.layers.keys()
    for layer, stats in report.layers.items():
        assert dataclasses.astuple(done.layers[layer]) == pytest.approx(dataclasses.astuple(stats), rel=1e-5)
    names = {p.name for p in (folder / "merged").iterdir()}
    assert {"config.json", "notes.txt", INDEX} <= names and not {"pytorch_model.bin", correction.NAME} & names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bases_bytes_come_back_from_disk(llama_or_gpt2: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = checkpoint(llama_or_gpt2, dtype, tmp_path)
    done = merge.merge_files(folder / "base", folder / "adapter", folder / "merged", reversible=True)
    assert 0 < done.correction < done.bytes
    assert hashes(folder / "merged") != hashes(folder / "base")
    back = merge.unmerge_files(folder / "merged", folder / "adapter", folder / "back")
    assert back.exact and hashes(folder / "back") == hashes(folder / "base")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_doras_merge_on_disk_is_the_merge_in_memory(llama_or_gpt2: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = checkpoint(llama_or_gpt2, dtype, tmp_path, deltaw.DoRA(rank=4, alpha=6))
    merge.merge_files(folder / "base", folder / "adapter", folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    deltaw.load(model, folder / "adapter")
    deltaw.merge(model)
    found = weights(AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=dtype))
    assert all(torch.equal(found[name], value) for name, value in weights(model).items())
    layers = verify_merged(folder / "merged", folder / "base", folder / "adapter")
    assert layers == deltaw.summary(model).adapters["default"].layers
    with pytest.raises(NotByFiles, match="only A and B of dense layers"):
        merge.merge_files(folder / "base", folder / "adapter", folder / "no", reversible=True)
    assert not (folder / "no").exists()


@pytest.mark.slow
def test_smollm2_in_bfloat16_goes_through_disk_and_back(smollm2: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="100MB")
    fill(deltaw.attach(model, deltaw.LoRA(rank=8, alpha=20)), size=0.03)
    deltaw.save(model, tmp_path / "adapter")
    deltaw.merge(model)
    merge.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", reversible=True)
    found = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16))
    assert all(torch.equal(found[name], value) for name, value in weights(model).items())
    assert merge.unmerge_files(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back").exact
    assert hashes(tmp_path / "back") == hashes(tmp_path / "base") != hashes(tmp_path / "merged")
    assert (tmp_path / "merged" / correction.NAME).stat().st_size < 0.05 * sum(
        path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_correction_the_base_comes_back_within_what_is_said(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = checkpoint(MAKERS["llama"], dtype, tmp_path)
    merge.merge_files(folder / "base", folder / "adapter", folder / "merged")
    back = merge.unmerge_files(folder / "merged", folder / "adapter", folder / "back")
    found, base = (weights(AutoModelForCausalLM.from_pretrained(folder / n, dtype=dtype)) for n in ("back", "base"))
    largest = max(float((found[n].double() - w.double()).abs().max()) for n, w in base.items())
    assert not back.exact and 0 < largest <= back.largest_error


def test_a_checkpoint_without_the_models_prefix(tmp_path: Path) -> None:
    """As the hub's gpt2 is."""
    torch.manual_seed(1)
    body = GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=96))
    body.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fill(deltaw.attach(model, deltaw.LoRA(rank=4, alpha=6)))
    deltaw.save(model, tmp_path / "adapter")
    deltaw.merge(model)
    merge.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", reversible=True)
    found = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert all(torch.equal(found[n], w) for n, w in weights(model).items())
    merge.unmerge_files(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "base")


@pytest.fixture
def reversible(tmp_path: Path) -> Path:
    folder = checkpoint(MAKERS["llama"], torch.bfloat16, tmp_path)
    merge.merge_files(folder / "base", folder / "adapter", folder / "merged", reversible=True)
    return folder


def refused(folder: Path, what: str, *, adapter: str = "adapter", error: type[Exception] = MergeError) -> None:
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(error, match=what):
        merge.unmerge_files(folder / "merged", folder / adapter, folder / "back")
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_merged_file_that_was_changed_since_is_refused(reversible: Path) -> None:
    path = sorted((reversible / "merged").glob("*.safetensors"))[0]
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(held)
    refused(reversible, "has changed since it was merged")


def test_another_adapter_is_refused(reversible: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(reversible / "base")
    deltaw.attach(model, deltaw.LoRA(rank=4, alpha=6))
    deltaw.save(fill(model, seed=9), reversible / "other")
    refused(reversible, "is not the one that was merged", adapter="other")


@pytest.mark.parametrize("damage", ["cut", "noise", "format"])
def test_a_damaged_correction_is_refused(reversible: Path, damage: str) -> None:
    path = reversible / "merged" / correction.NAME
    held = path.read_bytes()
    if damage == "cut":
        path.write_bytes(held[: len(held) // 2])
    elif damage == "noise":
        middle = len(held) // 2
        path.write_bytes(held[:middle] + bytes(b ^ 255 for b in held[middle : middle + 40]) + held[middle + 40 :])
    else:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        parts["manifest.json"] = parts["manifest.json"].replace(b'"format": 2', b'"format": 3')
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, part)
    refused(reversible, "correction|damaged", error=FileError)


@pytest.mark.parametrize("change", [
    {"shards": 3}, {"shards": {"a": 1}}, {"added": "name"}, {"added": [1]}, {"untied": []}, {"adapter": None}, {"format": "2"},
    {"unknown": 1},
], ids=str)  # fmt: skip
def test_a_manifest_of_other_types_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with correction.writing(tmp_path / correction.NAME, "hash"):
        pass
    manifest = dataclasses.asdict(correction.Reader(tmp_path / correction.NAME).manifest)
    with zipfile.ZipFile(tmp_path / correction.NAME, "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest | change))
    with pytest.raises(FileError, match="no correction file, or a damaged one"):
        correction.Reader(tmp_path / correction.NAME)


def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    folder = checkpoint(MAKERS["llama"], torch.float32, tmp_path)
    index = folder / "base" / INDEX
    kept = json.loads(index.read_text())
    assert kept["weight_map"]
    torch.manual_seed(0)
    MAKERS["gpt2"]().save_pretrained(folder / "other")
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(FileError) as caught:
        merge.merge_files(folder / "other", folder / "adapter", folder / "merged")
    assert "no tensor of the layer 'model.layers.0.self_attn.q_proj'" in str(caught.value)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_two_layers_that_would_share_a_tensor_are_refused(tmp_path: Path) -> None:
    """By their names without a prefix; one of the updates would be lost."""
    model = torch.nn.ModuleDict({n: torch.nn.ModuleDict({"q": torch.nn.Linear(8, 6)}) for n in ("encoder", "decoder")})
    fill(deltaw.attach(model, deltaw.LoRA(rank=2, alpha=3)))
    deltaw.save(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.ones(6, 8)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(FileError, match=r"q\.weight would be the weight of both"):
        merge.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def mixed_layouts(folder: Path) -> Any:
    """GPT-2 with updates on square Conv1D layers, stored [k, d], and on its head, stored [d, k]."""
    torch.manual_seed(1)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=96, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    fill(deltaw.attach(model, deltaw.LoRA(rank=4, alpha=6, targets=["*.attn.c_proj", "lm_head"])))
    deltaw.save(model, folder / "adapter")
    deltaw.merge(model)
    return model


def test_layers_that_are_stored_either_way_in_one_model(tmp_path: Path) -> None:
    model = mixed_layouts(tmp_path)
    merge.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", reversible=True)
    found = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert all(torch.equal(found[n], w) for n, w in weights(model).items())
    merge.unmerge_files(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "base")


def test_a_foreign_file_that_does_not_say_how_square_layers_are_stored_is_not_guessed(tmp_path: Path) -> None:
    mixed_layouts(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path), path)  # without our metadata
    with pytest.raises(NotByFiles, match="square, cannot be told"):
        merge.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_update_that_its_dtype_rounds_away_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(MAKERS["llama"], torch.bfloat16, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    fill(deltaw.attach(model, deltaw.LoRA(rank=4, alpha=6)), size=1e-6)
    deltaw.save(model, folder / "small")
    with pytest.raises(MergeError, match="rounds ΔW away"):
        merge.merge_files(folder / "base", folder / "small", folder / "merged")
    assert not (folder / "merged").exists()


def test_a_merge_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(MAKERS["llama"], torch.float32, tmp_path)
    genuine, count = merge.merge_, [0]

    def interrupted(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return genuine(*arguments)

    monkeypatch.setattr(merge, "merge_", interrupted)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge.merge_files(folder / "base", folder / "adapter", folder / "merged")
    assert sorted(p.name for p in folder.iterdir()) == before


def with_head(make: Any, dtype: torch.dtype, folder: Path, **settings: Any) -> Any:
    """A checkpoint whose head is its embedding's tensor, and an adapter of the head; the model with it on."""
    torch.manual_seed(1)
    model = make().to(dtype).eval()
    model.save_pretrained(folder / "base", **settings)
    fill(deltaw.attach(model, deltaw.LoRA(rank=4, alpha=6, targets=["lm_head", "*.1.*"])))
    deltaw.save(model, folder / "adapter")
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_a_head_gets_a_tensor_of_its_own_and_the_bases_bytes_come_back(
    llama_or_gpt2: Any, dtype: torch.dtype, size: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = with_head(llama_or_gpt2, dtype, tmp_path, max_shard_size=size)
    base, adapter, merged, back = (tmp_path / name for name in ("base", "adapter", "merged", "back"))
    with pytest.raises(NotByFiles, match="no tensor of the layer 'lm_head'"):
        merge.merge_files(base, adapter, merged)
    done = merge.merge_files(base, adapter, merged, untie=True, reversible=True)
    deltaw.merge(model, untie=True)
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype).eval()
    assert not found.config.tie_word_embeddings and found.get_input_embeddings().weight is not found.lm_head.weight
    assert weights(found).keys() == weights(model).keys()
    assert all(torch.equal(weights(found)[name], value) for name, value in weights(model).items())
    if dtype == torch.float32:  # positions are computed in it wherever a checkpoint is opened
        assert torch.equal(found(ids).logits, model(ids).logits)
    assert done.bytes == sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    assert verify_merged(merged, base, adapter) == len(done.layers)
    assert merge.unmerge_files(merged, adapter, back).exact and hashes(back) == hashes(base)


def test_a_head_of_a_checkpoint_without_the_models_prefix(ids: torch.Tensor, tmp_path: Path) -> None:
    """As the hub's gpt2 is."""
    torch.manual_seed(1)
    body = GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=96))
    body.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    fill(deltaw.attach(model, deltaw.LoRA(rank=4, alpha=6, targets=["lm_head", "c_attn"])))
    deltaw.save(model, tmp_path / "adapter")
    merge.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", untie=True, reversible=True)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    merge.unmerge_files(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "base")


def test_what_a_head_is_tied_to_is_not_guessed(tmp_path: Path) -> None:
    with_head(MAKERS["llama"], torch.float32, tmp_path)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    for other in ({"is_encoder_decoder": True}, {"vocab_size": 97}, {"tie_word_embeddings": False}):
        path.write_text(json.dumps(config | other))
        with pytest.raises(NotByFiles, match="no tensor of the layer 'lm_head'"):
            merge.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", untie=True)


def test_a_tied_weight_that_is_stored_twice(ids: torch.Tensor, tmp_path: Path) -> None:
    model = with_head(MAKERS["llama"], torch.float32, tmp_path)
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    held = load_file(base / "model.safetensors")
    save_file(
        held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(NotByFiles, match="twice that its model ties"):
        merge.merge_files(base, adapter, merged)
    merge.merge_files(base, adapter, merged, untie=True, reversible=True)
    found = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert not found.config.tie_word_embeddings
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    merge.unmerge_files(merged, adapter, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(base)
