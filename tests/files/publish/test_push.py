"""`deltaw push`: what goes to the hub, what stays here, and one message for each way that it can fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.files.publish.push import package
from tests.cli.conftest import Run, place, run  # noqa: F401
from tests.conftest import tiny_llama
from tests.files.publish.conftest import Hub

ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def adapter(place: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A trained adapter, with something else in its folder."""
    folder = tmp_path / "adapter"
    shutil.copytree(place / "run" / "adapter", folder)
    (folder / "notes.txt").write_text("private")
    return folder


def test_a_pushed_adapter_is_whole_and_names_no_path_of_this_machine(
    hub: Hub, adapter: Path, place: Path, tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    done = run("push", adapter, "me/small", "--base", "org/model", "--private")
    assert done.returncode == 0, done.stderr
    assert f"Pushed: {hub.url}/me/small" in done.stdout and "notes.txt" in done.stdout
    files = hub.files["me/small"]
    assert sorted(files) == ADAPTER and hub.repos == {"me/small": True} and hub.commits == 1
    assert not any(str(tmp_path).encode() in content or str(place).encode() in content for content in files.values())
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/model"
    assert b'base_model: "org/model"' in files["README.md"]
    there = tmp_path / "downloaded"
    there.mkdir()
    for name, content in files.items():
        (there / name).write_bytes(content)
    deltaw.load(AutoModelForCausalLM.from_pretrained(place / "model"), there)
    assert deltaw.files.store.training_of(there)["separator"] == "#"
    before = deltaw.files.store.read(adapter)
    after = deltaw.files.store.read(there)
    assert all((a == b).all() for n in before.factors for a, b in zip(before.factors[n], after.factors[n], strict=True))


def test_no_path_of_this_machine_goes_out_wherever_it_is(tmp_path: Path) -> None:
    """Also inside groups and lists of a training's settings, and from a file that an older version wrote."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = deltaw.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), deltaw.LoRA(rank=2))
    training = {"data": {"train": str(tmp_path / "a.jsonl")}, "more": [str(tmp_path / "b.jsonl"), 3], "lr": 0.1}
    folder = deltaw.save(model, tmp_path / "a", training=training)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "base")})
    )
    packed = package(folder)
    contents = [part if isinstance(part, bytes) else part.read_bytes() for part in packed.files.values()]
    assert not any(str(tmp_path).encode() in content for content in contents) and packed.base == "./base"
    there = tmp_path / "there"
    there.mkdir()
    for name, content in zip(packed.files, contents, strict=True):
        (there / name).write_bytes(content)
    assert deltaw.files.store.training_of(there) == {"data": {"train": "a.jsonl"}, "more": ["b.jsonl", 3], "lr": 0.1}


def test_a_dry_run_says_what_would_go_and_asks_nobody(hub: Hub, adapter: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811  # fmt: skip
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = run("push", adapter, "me/small", "--dry-run")
    assert done.returncode == 0 and all(name in done.stdout for name in ADAPTER) and "kB" in done.stdout
    assert "Nothing was pushed" in done.stdout and "--base" in done.stderr and not hub.repos


def test_a_card_that_somebody_wrote_goes_as_it_is(hub: Hub, adapter: Path, run: Run) -> None:  # noqa: F811
    (adapter / "README.md").write_text("mine")
    assert run("push", adapter, "me/small", "--base", "org/model").returncode == 0
    assert hub.files["me/small"]["README.md"] == b"mine"


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors missing"),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json missing"),
        (lambda f: flip(f / "adapter_model.safetensors"), "checksum"),
        (lambda f: shutil.rmtree(f), "no adapter folder"),
    ],
)
def test_what_is_no_whole_adapter_is_not_pushed(harm: object, why: str, hub: Hub, adapter: Path, run: Run) -> None:  # noqa: F811
    harm(adapter)  # type: ignore[operator]
    done = run("push", adapter, "me/small")
    assert done.returncode != 0 and why in done.stderr and not hub.repos and "Traceback" not in done.stderr


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "fault", ["no token", "unknown token", "no permission", "no network", "no name", "public", "base"]
)
def test_each_way_to_fail_is_one_message(
    fault: str, hub: Hub, adapter: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    words, expected = ["push", adapter, "me/small"], ""
    if fault == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        expected = "hf auth login"
    elif fault == "unknown token":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        expected = "does not know the token"
    elif fault == "no permission":
        hub.may_write = False
        expected = "no permission to write to me/small"
    elif fault == "no network":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        expected = "cannot be reached"
    elif fault == "no name":
        words[2] = "me/small/er"
        expected = "OWNER/NAME"
    elif fault == "public":
        hub.repos["me/small"] = False
        words.append("--private")
        expected = "is public"
    else:
        words += ["--base", "/models/llama"]
        expected = "the base's id on the hub"
    done = run(*words)
    assert done.returncode in (2, 5) and expected in done.stderr
    assert "Traceback" not in done.stderr and "hf_" not in done.stderr and not hub.commits


@pytest.mark.parametrize("name", ["bad repo!!", "me/small/er", "me/x.git", "-me/x"])
def test_a_dry_run_refuses_a_name_that_the_hub_has_no_form_for(name: str, adapter: Path, run: Run) -> None:  # noqa: F811
    done = run("push", "--dry-run", "--", adapter, name)
    assert done.returncode == 2 and "it is OWNER/NAME" in done.stderr and not done.stdout
