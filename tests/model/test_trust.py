"""Python code that comes with a model runs only where a user has asked for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw.config import PlanConfig, TrainConfig
from deltaw.errors import FileError
from deltaw.model.pretrained import load_pretrained, read_config
from tests.data.conftest import write_chat_model

RECORDS = [{"prompt": f"{i}?", "completion": f" {i}"} for i in range(6)]
# Each line writes what it is into a file, so that a test sees whether the module was imported at all
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

with open({marker!r}, "a") as file:
    file.write(__name__.rpartition(".")[2] + "\\n")


class OwnConfig(LlamaConfig):
    model_type = "own-{name}"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def model_with_code(tmp_path: Path) -> tuple[Path, Path]:
    """A model folder of a kind that transformers does not know, with its code; and the file that this code writes."""
    folder, marker = tmp_path / f"own_{tmp_path.name}", tmp_path / "marker"
    write_chat_model(folder)
    (folder / "code_of_it.py").write_text(CODE.format(marker=str(marker), name=tmp_path.name))
    change(
        folder / "config.json", model_type=f"own-{tmp_path.name}", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP
    )
    return folder, marker


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    return model_with_code(tmp_path)


AUTO_MAP = {
    "AutoConfig": "code_of_it.OwnConfig",
    "AutoModelForCausalLM": "code_of_it.OwnForCausalLM",
    "AutoModel": "code_of_it.OwnForCausalLM",
}


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def train(folder: Path, **settings: Any) -> object:
    config = TrainConfig(out=str(folder.parent / "run"), steps=1, samples=0, **settings)
    return deltaw.train(str(folder), RECORDS, config, method=deltaw.LoRA(rank=1))


OPENINGS: dict[str, Callable[..., object]] = {
    "load": lambda folder, **trust: load_pretrained(str(folder), device="cpu", **trust),
    "config": lambda folder, **trust: read_config(str(folder), **trust),
    "plan": lambda folder, **trust: deltaw.plan(
        str(folder), PlanConfig(methods="lora", device="cpu", length=8, **trust)
    ),
    "train": train,
}


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_models_code_runs_only_where_it_is_asked_for(own: tuple[Path, Path], opening: str) -> None:
    folder, marker = own
    with pytest.raises(FileError, match=r"(?s)needs Python code.*--trust-remote-code.*whatever you can do"):
        OPENINGS[opening](folder)
    assert not marker.exists()
    OPENINGS[opening](folder, trust_remote_code=True)
    assert "code_of_it" in marker.read_text()


def test_a_tokenizers_code_runs_only_where_it_is_asked_for(tmp_path: Path) -> None:
    folder, marker = tmp_path / f"tokens_{tmp_path.name}", tmp_path / "marker"
    write_chat_model(folder)
    (folder / "code_of_it.py").write_text(CODE.format(marker=str(marker), name=tmp_path.name))
    auto_map = {"AutoTokenizer": [None, "code_of_it.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    try:
        load_pretrained(str(folder), device="cpu")
    except FileError as error:
        assert "--trust-remote-code" in str(error)
    assert not marker.exists()
    loaded = load_pretrained(str(folder), device="cpu", trust_remote_code=True)
    assert type(loaded.tokenizer).__name__ == "OwnTokenizer" and marker.exists()


def test_code_that_transformers_has_a_class_for_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    write_chat_model(folder)
    (folder / "code_of_it.py").write_text(CODE.format(marker=str(marker), name=tmp_path.name))
    change(folder / "config.json", auto_map=AUTO_MAP)
    with caplog.at_level("WARNING", logger="deltaw"):
        loaded = load_pretrained(str(folder), device="cpu")
    assert type(loaded.model).__module__.startswith("transformers.") and not marker.exists()
    assert "is not run: transformers' own LlamaForCausalLM" in caplog.text


def test_code_that_fails_is_one_error(own: tuple[Path, Path]) -> None:
    folder, _ = own
    (folder / "code_of_it.py").write_text("raise LookupError('there is no such table')\n")
    with pytest.raises(FileError, match="there is no such table"):
        load_pretrained(str(folder), device="cpu", trust_remote_code=True)


def test_a_config_cannot_name_what_a_conversion_calls(tmp_path: Path) -> None:
    import torch

    write_chat_model(tmp_path / "model")
    change(tmp_path / "model" / "config.json", architectures=["set_seed"])
    torch.save({"q_proj.lora_A": torch.ones(2, 8), "q_proj.lora_B": torch.ones(8, 2)}, tmp_path / "lora.pt")
    seed = torch.initial_seed()
    deltaw.convert(tmp_path / "lora.pt", tmp_path / "out", alpha=4, base=tmp_path / "model")
    assert torch.initial_seed() == seed


@pytest.fixture
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the modules that transformers copies out of the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


pytestmark = pytest.mark.usefixtures("_modules")
