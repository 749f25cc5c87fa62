"""`deltaw merge`, and `deltaw unmerge` after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.cli import main
from tests.cli.conftest import Run
from tests.conftest import fill


def test_merge_gives_an_ordinary_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert main(["merge", str(place / "model"), str(place / "run" / "adapter"), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Merge report" in printed and "model.layers.*.mlp.up_proj" in printed
    merged: Any = AutoModelForCausalLM.from_pretrained(out)
    base: Any = AutoModelForCausalLM.from_pretrained(place / "model")
    assert type(merged) is type(base) and list(merged.state_dict()) == list(base.state_dict())
    assert (out / "tokenizer.json").is_file()
    assert not any("deltaw" in p.read_text(errors="ignore") for p in out.glob("*.json"))
    deltaw.load(base, place / "run" / "adapter")
    deltaw.merge(base)
    weights = dict(base.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in merged.named_parameters())
    assert main(["merge", str(place / "model"), str(place / "run" / "adapter"), "-o", str(out)]) == 2


def test_a_reversible_merge_gives_the_bases_bytes_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = str(place / "model"), str(place / "run" / "adapter")
    merged, back = str(tmp_path / "merged"), str(tmp_path / "back")
    assert main(["merge", model, adapter, "-o", merged, "--reversible", "--check", "off"]) == 0
    assert "Correction file" in (printed := capsys.readouterr().out) and "--check on" in printed
    assert main(["unmerge", merged, adapter, "-o", back]) == 0
    assert "sha256 is the same" in capsys.readouterr().out
    names = {p.name for p in Path(model).iterdir()}
    assert {p.name for p in Path(back).iterdir()} == names
    assert all((Path(back) / n).read_bytes() == (Path(model) / n).read_bytes() for n in names)
    assert main(["unmerge", merged, adapter, "-o", back]) == 2
    (Path(merged) / "base.correction").unlink()
    assert main(["unmerge", merged, adapter, "-o", back, "--overwrite"]) == 0
    assert "There is no correction file" in capsys.readouterr().out
    assert main(["merge", model, adapter, "-o", merged, "--overwrite", "--reversible", "--dtype", "bfloat16"]) == 2


def test_a_model_of_the_hub_is_merged_on_disk_too(
    place: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, as it lies there after a download."""
    cache = tmp_path / "cache" / "models--someone--small"
    shutil.copytree(place / "model", cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    adapter = place / "run" / "adapter"
    done = run("merge", "someone/small", adapter, "-o", tmp_path / "merged", "--reversible")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "base.correction").is_file() and (tmp_path / "merged" / "config.json").is_file()
    done = run("merge", "someone/other", adapter, "-o", tmp_path / "other", "--reversible")
    assert done.returncode == 5 and "someone/other cannot be had from the hub" in done.stderr
    assert not (tmp_path / "other").exists()


def test_merge_into_another_precision_goes_by_the_model(place: Path, tmp_path: Path) -> None:
    words = ["merge", str(place / "model"), str(place / "run" / "adapter"), "-o", str(tmp_path / "half")]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_resized_vocabulary_trains_merges_and_verifies(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that adds tokens, through every command that takes one; the merged model has them."""
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    count = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(count + 3, mean_resizing=False)
    tokens = f"{count},{count + 1},{count + 2}"
    fill(deltaw.attach(base, deltaw.DoRA(rank=4, alpha=6, targets="qv", tokens=tokens)))
    deltaw.save(base, tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    assert main(["inspect", adapter]) == 0
    shown = capsys.readouterr().out
    assert "tokens of model.embed_tokens" in shown and "3×32" in shown and "magnitude of" in shown
    assert main(["verify", str(place / "model"), adapter]) == 0
    assert main(["merge", str(place / "model"), adapter, "-o", str(tmp_path / "merged")]) == 0
    assert "merging in memory" in capsys.readouterr().err
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), torch.tensor([[1, count, 5, count + 2]])
    torch.testing.assert_close(merged(ids).logits, base.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert main(["merge", str(place / "model"), adapter, "-o", str(tmp_path / "no"), "--reversible"]) != 0
    said = capsys.readouterr().err
    assert (
        "By files alone only A and B of dense layers" in said
        and "Without --reversible this is merged in memory" in said
    )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("check", ["on", "off", "auto"])
def test_check_says_whether_a_merge_in_memory_is_loaded_again(
    check: str, place: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaw.runs import export

    compared: list[Path] = []
    real = export._compared
    monkeypatch.setattr(export, "_compared", lambda folder, *rest: compared.append(folder) or real(folder, *rest))
    words = ("merge", place / "model", place / "run" / "adapter", "-o", tmp_path / "merged", "--dtype", "float16")
    done = run(*words, "--check", check)
    assert done.returncode == 0, done.stderr
    assert len(compared) == (0 if check == "off" else 1)
    assert ("Not loaded and compared" in done.stdout) == (check == "off")
    assert "torch_dtype" in json.loads((tmp_path / "merged" / "config.json").read_text())
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert weights.dtype == torch.float16 and not (tmp_path / "merged" / "adapter_config.json").exists()
