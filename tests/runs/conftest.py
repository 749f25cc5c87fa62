"""A tiny model and its records in one folder, for whole studies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.conftest import write_chat_model

WORDS = ["red", "blue", "green", "white", "black", "brown"]
RECORDS = [{"prompt": f"{a} and {b}?", "completion": f" {b} {a}"} for a in WORDS for b in WORDS if a != b]
BEFORE = Path(__file__).parent / "data" / "before"
"""Folders that a version of before wrote, where its model was `model` and its records `data.jsonl`."""


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `data.jsonl`."""
    folder = tmp_path_factory.mktemp("study")
    write_chat_model(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return folder
