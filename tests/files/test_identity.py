"""The base's fingerprint: of what the base is now, in whatever precision, and which adapters it lets through."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw import attach, detach, load, save
from deltaw.errors import BaseMismatch, FileError
from deltaw.files.formats import peft as peft_files
from deltaw.files.identity import base_fingerprint
from deltaw.model.record import named_parameters
from tests.conftest import MAKERS, assert_same, fill, snapshot, tiny_llama
from tests.files.test_store import METHODS, twin


def test_a_base_that_changes_while_attached_gets_another_fingerprint(tmp_path: Path) -> None:
    model = fill(attach(tiny_llama(), METHODS["plain"]))
    first = base_fingerprint(model)
    deltaw.merge(model)
    assert base_fingerprint(model) == first
    deltaw.unmerge(model)
    assert base_fingerprint(model) == first
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert base_fingerprint(model) != first


@pytest.mark.parametrize("change", ["entry", "exchanged", "step", "memory"])
def test_a_fingerprint_is_of_what_the_base_is_now(change: str, tmp_path: Path) -> None:
    model = attach(tiny_llama(), METHODS["plain"])
    fill(model)
    save(model, tmp_path / "before")
    weight = model.model.layers[1].mlp.up_proj.weight
    if change == "entry":
        weight.data[3, 4] += 1
    if change == "exchanged":
        weight.data[0, 0], weight.data[5, 7] = weight.data[5, 7].clone(), weight.data[0, 0].clone()
    if change == "step":
        weight.requires_grad_(True).grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    if change == "memory":
        weight.data = weight.data * 2
    save(model, tmp_path / "after")
    now = detach(copy.deepcopy(model))
    load(now, tmp_path / "after")
    for one in (model, now):
        with pytest.raises(BaseMismatch):
            load(one, tmp_path / "before", name="again")


def test_what_takes_longer_than_reading_is_computed_once(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base tensor is read for each file, and rounded to both narrower dtypes only when its values have changed."""
    from deltaw.files import identity

    genuine, rounded = identity.content_of, []

    def counted(tensor: torch.Tensor, dtype: torch.dtype) -> Any:
        rounded.append(tensor)
        return genuine(tensor, dtype)

    monkeypatch.setattr(identity, "content_of", counted)
    save(fill(attach(tiny, METHODS["plain"])), tmp_path / "a")
    count = len(rounded)
    assert count == 2 * len(list(named_parameters(tiny)))
    save(tiny, tmp_path / "b")
    assert len(rounded) == count
    detach(tiny)
    for name in "xy":
        load(tiny, tmp_path / "a", name=name)
    assert len(rounded) == count
    next(tiny.parameters()).data.add_(1.0)
    with pytest.raises(BaseMismatch):
        load(tiny, tmp_path / "a", name="z")
    save(tiny, tmp_path / "c", name="x")
    assert len(rounded) == count + 2


def test_another_base_is_an_error_with_an_override(tmp_path: Path) -> None:
    model = tiny_llama()
    fill(attach(model, METHODS["plain"]))
    save(model, tmp_path / "a")
    other = detach(twin(model))
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    before = snapshot(other)
    with pytest.raises(BaseMismatch, match="--any-base"):
        load(other, tmp_path / "a")
    assert_same(other, before)
    load(other, tmp_path / "a", check_base=False)


def _negated_off_a_sample(model: Any) -> None:
    for p in model.parameters():
        if p.ndim > 1:
            flat = p.view(-1)
            step = max(1, flat.numel() // 1024)
            kept = flat[::step].clone()
            flat.neg_()[::step] = kept


def _reordered(model: Any) -> None:
    W = next(p for n, p in model.named_parameters() if "q_proj" in n or "c_attn" in n)
    order = torch.randperm(W.numel(), generator=torch.Generator().manual_seed(0))
    W.copy_(W.flatten()[order].view_as(W))


def _two_layers_exchanged(model: Any) -> None:
    one, other = (p for n, p in model.named_parameters() if n.endswith(("q_proj.weight", "attn.c_attn.weight")))
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


@pytest.mark.parametrize("change", [_negated_off_a_sample, _reordered, _two_layers_exchanged])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_other_base_passes_as_this_one_in_another_precision(
    tiny: Any, dtype: torch.dtype, change: Any, tmp_path: Path
) -> None:
    other = twin(tiny)
    save(fill(attach(tiny, METHODS["plain"])), tmp_path / "a")
    with torch.no_grad():
        change(other)
    other.to(dtype)
    before = snapshot(other)
    with pytest.raises(BaseMismatch):
        load(other, tmp_path / "a")
    assert_same(other, before)


def test_a_fingerprint_of_an_older_version_is_a_warning(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = twin(tiny)
    save(fill(attach(tiny, METHODS["plain"])), tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    old = ":".join(["0123456789abcdef" * 2] * 3)
    save_file(load_file(weights), weights, metadata={"deltaw_format": "1", "deltaw_base": old, "deltaw_w0": old})
    load(plain, tmp_path / "a")
    assert "older version" in caplog.text
    save_file(load_file(weights), weights, metadata={"deltaw_format": "1", "deltaw_base": "2:damaged"})
    with pytest.raises(FileError, match="damaged"):
        load(plain, tmp_path / "a", name="b")


def test_a_base_that_is_not_in_memory_is_not_checked(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some of it, as where a package keeps layers on disk."""
    away = twin(tiny)
    away.get_input_embeddings().to("meta")
    save(fill(attach(tiny, METHODS["plain"])), tmp_path / "a")
    load(away, tmp_path / "a")
    assert "not in memory" in caplog.text
    save(away, tmp_path / "b")
    file = peft_files.read(tmp_path / "b")
    assert peft_files.BASE not in file.metadata and "names no base" in caplog.text
    assert all(torch.equal(A, peft_files.read(tmp_path / "a").factors[n][0]) for n, (A, _) in file.factors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(MAKERS))
def test_the_same_base_in_another_precision_is_recognised(
    kind: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = MAKERS[kind]()
    cast = twin(model).to(dtype)
    fill(attach(model, METHODS["plain"]))
    save(model, tmp_path / "a")
    with caplog.at_level(logging.DEBUG, logger="deltaw"):
        load(cast, tmp_path / "a")
    assert "another precision" in caplog.text


def test_a_file_without_a_fingerprint_is_a_warning(tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = twin(tiny)
    fill(attach(tiny, METHODS["plain"]))
    save(tiny, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for named, said in (
        ("some/base", "its base, some/base at revision v2 ("),
        (None, "its base, which it does not name ("),
    ):
        settings |= {"base_model_name_or_path": named, "revision": "v2"}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
        load(twin(plain), tmp_path / "a")
        assert f"has no fingerprint of {said}" in caplog.text
