"""Code of a model runs by a flag on the command line alone: not by an answer from a pipe, and not by a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.errors import ConfigError, FileError
from tests.cli.conftest import Run
from tests.model.test_trust import RECORDS, model_with_code


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    return model_with_code(tmp_path)


def test_a_yes_in_a_pipe_runs_nothing(own: tuple[Path, Path], run: Run) -> None:
    folder, marker = own
    ended = run("generate", folder, "--max-new-tokens", "2", stdin="y\nyes\ny\n")
    assert ended.returncode == FileError.exit_code and "--trust-remote-code" in ended.stderr
    assert not marker.exists()
    ended = run("generate", folder, "Hi", "--max-new-tokens", "2", "--trust-remote-code")
    assert ended.returncode == 0 and marker.exists(), ended.stderr


def test_a_settings_file_cannot_allow_it_alone(own: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    folder, marker = own
    data, settings = tmp_path / "data.jsonl", tmp_path / "settings.yaml"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    settings.write_text(
        f"model: {folder}\ndata: {data}\nout: {tmp_path / 'run'}\nsteps: 1\nsamples: 0\ntrust_remote_code: true\n"
    )
    ended = run("train", "--config", settings)
    assert ended.returncode == ConfigError.exit_code and "a file cannot allow" in ended.stderr
    assert not marker.exists()
    assert run("train", "--config", settings, "--trust-remote-code").returncode == 0
    assert marker.exists()
    marker.unlink()
    # The run's own settings say so too, and rank opens its base again
    ended = run("rank", tmp_path / "run", "--records", data)
    assert ended.returncode == FileError.exit_code and "--trust-remote-code" in ended.stderr
    assert not marker.exists()


@pytest.fixture
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the modules that transformers copies out of the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


pytestmark = pytest.mark.usefixtures("_modules")
