"""The examples in docstrings run as they stand, in a folder with a tiny model in model/ and records in train.jsonl."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
from pathlib import Path

import pytest

import deltaw
from tests.conftest import ROOT
from tests.data.conftest import write_chat_model

SRC = ROOT / "src" / "deltaw"
MODULES = sorted(
    ".".join(("deltaw", *path.relative_to(SRC).with_suffix("").parts))
    for path in SRC.rglob("*.py")
    if path.name != "__init__.py" and ">>> " in path.read_text(encoding="utf-8")
)
IN_PROCESSES = {"deltaw.runs.compare"}
"""Modules whose examples start processes of their own."""
WITHOUT_EXAMPLE: set[str] = {"__version__"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    write_chat_model(folder / "model")
    records = [{"prompt": f"{n} and one?", "completion": f" {n + 1}"} for n in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "module", [pytest.param(m, marks=pytest.mark.slow) if m in IN_PROCESSES else m for m in MODULES]
)
def test_examples_run(module: str, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testmod(importlib.import_module(module), optionflags=flags)
    assert tried and not failed


@pytest.mark.parametrize("name", sorted(set(deltaw.__all__) - WITHOUT_EXAMPLE))
def test_public_names_have_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(getattr(deltaw, name)) or "")
