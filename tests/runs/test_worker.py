"""A part of a comparison in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

from deltaw.runs import worker


def test_an_error_is_the_candidates_score(tmp_path: Path) -> None:
    task = {
        "name": "lora", "method": "lora", "settings": {}, "model": str(tmp_path / "none"), "train": "none.jsonl",
        "test": "none.jsonl", "metrics": ["loss"], "run": {}, "valid_metrics": [],
    }  # fmt: skip
    (tmp_path / worker.CANDIDATE).write_text(json.dumps(task))
    assert worker.main("candidate", tmp_path) == 6
    score = json.loads((tmp_path / worker.SCORE).read_text())
    assert score["task"] == task and "none.jsonl" in score["error"]
