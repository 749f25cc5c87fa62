"""A merged folder: an ordinary model with the adapter's logits, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.errors import BaseMismatch, MergeError
from deltaw.model.pretrained import save_pretrained
from deltaw.runs import export
from tests.conftest import MAKERS, fill
from tests.data.conftest import CHATML, tiny_tokenizer


@pytest.fixture(params=list(MAKERS))
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """(model folder, adapter folder, probe ids, logits of base + branch)."""
    torch.manual_seed(1)
    model = MAKERS[request.param]()
    model.resize_token_embeddings(300)
    model.eval()
    save_pretrained(model, tiny_tokenizer(CHATML), tmp_path / "base")
    deltaw.attach(model, deltaw.LoRA(rank=4, alpha=6))
    fill(model)
    deltaw.save(model, tmp_path / "adapter")
    ids = torch.randint(3, 96, (2, 9))
    with torch.no_grad():
        return tmp_path / "base", tmp_path / "adapter", ids, model(ids).logits


def test_the_folder_is_an_ordinary_model(folders: Any, tmp_path: Path) -> None:
    base, adapter, ids, expected = folders
    result = export.merge_to_folder(str(base), adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert result.compared.drift < 1e-4 and result.compared.agreement == 1.0 and result.report.relative > 0
    files = {p.name for p in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert "deltaw" not in (tmp_path / "merged" / "config.json").read_text()


def test_the_checkpoints_precision_is_kept(folders: Any, tmp_path: Path) -> None:
    base, adapter, _, _ = folders
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    save_pretrained(half, tiny_tokenizer(CHATML), tmp_path / "half")
    export.merge_to_folder(str(tmp_path / "half"), adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_another_base_is_refused_and_nothing_is_written(folders: Any, tmp_path: Path) -> None:
    base, adapter, _, _ = folders
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    save_pretrained(other, tiny_tokenizer(CHATML), tmp_path / "other")
    with pytest.raises(BaseMismatch):
        export.merge_to_folder(str(tmp_path / "other"), adapter, tmp_path / "merged")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter", "other"}


def test_a_folder_that_reads_back_differently_is_not_kept(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _, _ = folders
    genuine = export.save_pretrained

    def damaged(model: Any, tokenizer: Any, folder: Path) -> None:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "layers.1" in n or "h.1" in n).add_(1.0)
        genuine(model, tokenizer, folder)

    monkeypatch.setattr(export, "save_pretrained", damaged)
    with pytest.raises(MergeError, match="nothing was written"):
        export.merge_to_folder(str(base), adapter, tmp_path / "merged")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}
