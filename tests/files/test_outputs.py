"""What each function writes: never over its inputs or what others wrote, and after an error the old output, whole."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import deltaw
from deltaw.cli import main
from deltaw.errors import ConfigError, FileError
from deltaw.files.formats import correction
from tests.conftest import fill, tiny_llama


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base in `models/base`, an adapter of it, its merge and notes of the user's."""
    tiny_llama().save_pretrained(tmp_path / "models" / "base")
    deltaw.save(model_in(tmp_path), tmp_path / "adapter")
    deltaw.merge_files(tmp_path / "models" / "base", tmp_path / "adapter", tmp_path / "merged", reversible=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    return tmp_path


def model_in(place: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(place / "models" / "base")
    return fill(deltaw.attach(model, deltaw.LoRA(rank=4, targets="q")))


Write = Callable[[Path, Path], object]

WRITES: dict[str, Write] = {
    "save": lambda f, out: deltaw.save(model_in(f), out),
    "merge_files": lambda f, out: deltaw.merge_files(f / "models" / "base", f / "adapter", out),
    "reversible": lambda f, out: deltaw.merge_files(f / "models" / "base", f / "adapter", out, reversible=True),
    "unmerge": lambda f, out: deltaw.unmerge_files(f / "merged", f / "adapter", out),
    "compress": lambda f, out: deltaw.compress(f / "adapter", out, rank=1),
    "convert": lambda f, out: deltaw.convert(f / "adapter", out.with_name(f"{out.name}.bin")),
    "gguf": lambda f, out: deltaw.convert(f / "adapter", out.with_name(f"{out.name}.gguf"), base=f / "models" / "base"),
}
FILES = {"convert", "gguf"}
"""Those that write a file."""
INPUTS = {
    "save": ["models/base", "models", "models/base/adapter"],
    "merge_files": ["models/base", "models", "models/base/out", "adapter", "adapter/out"],
    "reversible": ["models/base", "models", "adapter"],
    "unmerge": ["merged", "merged/out", "adapter", "adapter/out"],
    "compress": ["adapter", "adapter/out"],
    "convert": ["adapter/out"],
}


def state(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("name", "out"), [(name, out) for name in INPUTS for out in INPUTS[name]])
def test_an_output_that_is_holds_or_lies_in_an_input_is_refused(name: str, out: str, place: Path) -> None:
    before = state(place)
    with pytest.raises(ConfigError, match="nothing was touched"):
        WRITES[name](place, place / out)
    assert state(place) == before


@pytest.mark.parametrize("name", sorted(WRITES.keys() - FILES))
def test_a_folder_of_something_else_is_not_replaced(name: str, place: Path) -> None:
    before = state(place)
    with pytest.raises(ConfigError, match=r"notes is not replaced.*thesis\.txt"):
        WRITES[name](place, place / "notes")
    assert state(place) == before
    (place / "notes" / "thesis.txt").unlink()
    WRITES[name](place, place / "notes")


@pytest.mark.parametrize("name", sorted(WRITES.keys() - FILES))
def test_an_output_of_the_same_kind_is_replaced(name: str, place: Path) -> None:
    WRITES[name](place, place / "out")
    first = state(place)
    WRITES[name](place, place / "out")
    assert state(place).keys() == first.keys()
    (place / "out" / "thesis.txt").write_text("mine")
    if name in ("save", "compress"):  # an adapter's folder keeps what else is in it
        WRITES[name](place, place / "out")
    else:
        with pytest.raises(ConfigError, match=r"would be lost: thesis\.txt"):
            WRITES[name](place, place / "out")
    assert (place / "out" / "thesis.txt").read_text() == "mine"


def test_an_adapters_folder_keeps_other_files_and_folders_and_no_stale_adapter(place: Path) -> None:
    (place / "adapter" / "checkpoint-3").mkdir()
    (place / "adapter" / "checkpoint-3" / "optimizer.pt").write_text("state")
    for stale in ("adapter_model.bin", "tokenizer.json"):
        (place / "adapter" / stale).write_text("old")
    deltaw.save(model_in(place), place / "adapter")
    assert state(place / "adapter").keys() == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint-3/optimizer.pt"
    }  # fmt: skip


def test_other_weights_are_not_taken_for_a_base_that_was_unmerged(place: Path) -> None:
    deltaw.unmerge_files(place / "merged", place / "adapter", place / "back")
    save_file({"a": torch.ones(2)}, place / "back" / "model.safetensors")
    with pytest.raises(ConfigError, match="since it is not a base of this model"):
        deltaw.unmerge_files(place / "merged", place / "adapter", place / "back")


def test_a_models_weights_are_not_replaced_by_an_adapters_file(place: Path) -> None:
    deltaw.convert(place / "adapter", place / "a.bin")
    deltaw.convert(place / "adapter", place / "a.bin")
    torch.save({"model.weight": torch.ones(2)}, place / "pytorch_model.bin")
    before = state(place)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is not replaced, since it holds no adapter"):
        deltaw.convert(place / "adapter", place / "pytorch_model.bin")
    assert state(place) == before


@pytest.mark.parametrize(
    "words",
    [
        "merge models/base adapter -o models/base", "merge models/base adapter -o models/base --dtype float32",
        "merge models/base adapter -o notes", "unmerge merged adapter -o merged", "compress adapter -o adapter --rank 1",
        "extract models/base merged -o merged --rank 1", "extract models/base merged -o notes --rank 1",
    ],
)  # fmt: skip
def test_commands_refuse_with_overwrite_too(
    words: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = state(place)
    assert main([*words.split(), "--overwrite"]) == 2
    assert "Choose another place" in capsys.readouterr().err and state(place) == before


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_leaves_the_old_output_and_says_its_path(name: str, place: Path) -> None:
    """Also where a few bytes are missing in the end, which some libraries do not notice."""
    resource = pytest.importorskip("resource")
    WRITES[name](place, place / "out")
    sizes = [file.stat().st_size for out in place.glob("out*") for file in (out, *out.rglob("*")) if file.is_file()]
    before, limits = state(place), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (min(1000, max(sizes) // 2), max(sizes) - 300, max(sizes) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(
                FileError, match=rf"{place}/out\S* could not be written( whole)?: (File too large|the disk)"
            ):
                WRITES[name](place, place / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert state(place) == before


MERGE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from deltaw.cli import main
print("here", flush=True)
sys.exit(main(["merge", "models/base", "adapter", "-o", "out", "--reversible", "--overwrite", "--check", "off"]))
"""


@pytest.mark.slow
def test_a_reversible_merge_that_is_stopped_leaves_the_old_or_the_new(place: Path) -> None:
    """By Ctrl-C. benchmarks/crashes.py kills all kinds of work."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, vocab_size=8000
    )
    wide: Any = LlamaForCausalLM(config)
    wide.save_pretrained(place / "models" / "base")
    deltaw.save(fill(deltaw.attach(wide, deltaw.LoRA(rank=4))), place / "adapter")
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", MERGE], cwd=place, check=True, env=environment)
    whole, seconds = state(place / "out"), time.monotonic() - start
    process = subprocess.Popen(
        [sys.executable, "-c", MERGE], cwd=place, text=True, stdout=-1, stderr=-1, env=environment
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds * 0.6)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    # -SIGINT: it came after the command had returned
    assert process.returncode in (0, 130, -signal.SIGINT) and "Traceback" not in said, said
    # The correction's archive has times in it; what it gives back is checked
    assert state(place / "out").items() >= {(n, h) for n, h in whole.items() if n != correction.NAME}
    deltaw.unmerge_files(place / "out", place / "adapter", place / "back")
    assert state(place / "back") == state(place / "models" / "base")
    deltaw.merge_files(place / "models" / "base", place / "adapter", place / "out", reversible=True)
    assert not [path.name for path in place.iterdir() if path.name.startswith(".")]
