"""`deltaw generate`."""

from __future__ import annotations

import json
from pathlib import Path

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
