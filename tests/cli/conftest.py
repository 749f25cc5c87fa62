"""A folder with a tiny model, data and one finished run, and a command as a user meets it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deltaw.cli import main
from tests.data.conftest import write_chat_model

WORDS = ["red", "blue", "green", "white"]
RECORDS = [{"prompt": f"{a} and {b}?", "completion": f" {b} {a}"} for a in WORDS for b in WORDS if a != b]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, data, and one finished run. Tests write elsewhere."""
    folder = tmp_path_factory.mktemp("cli")
    write_chat_model(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    words = ["train", str(folder / "model"), str(folder / "data.jsonl"), "--out", str(folder / "run")]
    assert main([*words, "--steps", "6", "--lr", "0.02", "--rank", "4", "--alpha", "6", "--separator", "#"]) == 0
    return folder


@dataclass
class Done:
    """What a command left behind: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """One command, with what it is told at the terminal."""

    def of(*words: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return of
