"""`deltaw inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deltaw
from deltaw.cli import main
from tests.conftest import tiny_llama


def test_layers_are_shown_in_a_table_and_as_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place / "run" / "adapter")]) == 0
    assert "layers" in capsys.readouterr().out
    assert main(["inspect", str(place / "run" / "adapter"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 14 and all(
        row["rank"] == 4 and row["scale"] == 1.5 and row["dW"] > 0 for row in found["layers"]
    )


def test_an_adapter_that_changes_nothing_is_named_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deltaw.save(deltaw.attach(tiny_llama(), deltaw.LoRA(rank=2)), tmp_path / "fresh")
    assert main(["inspect", str(tmp_path / "fresh")]) == 0
    assert "nothing: B is zero in all layers" in " ".join(capsys.readouterr().out.split())
