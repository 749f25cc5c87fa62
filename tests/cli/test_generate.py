"""`deltaw generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import RECORDS, Run


def test_prompt_file_and_standard_input_give_the_same_completions(place: Path, tmp_path: Path, run: Run) -> None:
    words = ["generate", place / "model", "--adapter", place / "run" / "adapter", "--max-new-tokens", 6]
    one = run(*words, "red and blue?").stdout.rstrip("\n")
    assert run(*words, "--file", place / "data.jsonl", "--out", tmp_path / "o.jsonl").returncode == 0
    pairs = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [p["prompt"] for p in pairs] == [r["prompt"] for r in RECORDS]
    assert next(p["completion"] for p in pairs if p["prompt"] == "red and blue?") == one
    lines = [json.loads(line) for line in run(*words, stdin="red and blue?\nblue and red?\n").stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["red and blue?", "blue and red?"] and lines[0]["completion"] == one


def test_a_bare_prompt_is_put_as_the_model_was_made_for(place: Path, run: Run) -> None:
    """In its chat template, unless the adapter was trained without it, or the user says so."""
    words = ["generate", place / "model", "red and blue?", "--max-new-tokens", 6]
    bare = run(*words)
    assert "put into the model's chat template; --template plain" in bare.stderr
    assert bare.stdout == run(*words, "--template", "chat").stdout
    plain = run(*words, "--template", "plain")
    assert "chat template" not in plain.stderr and plain.stdout != bare.stdout
    adapter = ["--adapter", place / "run" / "adapter"]  # which was trained on prompts without a template
    with_adapter = run(*words, *adapter)
    assert "chat template" not in with_adapter.stderr
    assert with_adapter.stdout == run(*words, *adapter, "--template", "plain").stdout


def test_a_model_that_says_nothing_is_told(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.training.tasks import Causal

    monkeypatch.setattr(Causal, "answer", lambda *given: [" "])
    said = run("generate", place / "model", "red and blue?")
    assert said.returncode == 0 and "The model said nothing: it ended at once. Try --template plain" in said.stderr


def test_one_prompt_as_json(place: Path, run: Run) -> None:
    words = ["generate", place / "model", "red and blue?", "--max-new-tokens", 6]
    (line,) = run(*words, "--json").stdout.splitlines()
    assert json.loads(line) == {"prompt": "red and blue?", "completion": run(*words).stdout[:-1]}
