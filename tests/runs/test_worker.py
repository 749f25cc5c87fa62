"""A part of a comparison in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.errors import TrainError
from deltaw.runs import worker
from deltaw.runs.apart import Processes


def test_an_error_is_the_candidates_score(tmp_path: Path) -> None:
    task = {
        "name": "lora", "method": "lora", "settings": {}, "model": str(tmp_path / "none"), "train": "none.jsonl",
        "test": "none.jsonl", "metrics": ["loss"], "run": {}, "valid_metrics": [],
    }  # fmt: skip
    (tmp_path / worker.CANDIDATE).write_text(json.dumps(task))
    assert worker.main("candidate", tmp_path) == 6
    score = json.loads((tmp_path / worker.SCORE).read_text())
    assert score["task"] == task and "none.jsonl" in score["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "result"), [("candidate", worker.SCORE), ("timing", worker.LATENCY)])
def test_a_process_that_breaks_down_leaves_no_result_of_other_settings(part: str, result: str, tmp_path: Path) -> None:
    """What was there from settings of before used to be taken for its result."""
    (tmp_path / result).write_text("{}")
    message = f"The {part} ended with 1 and no result; what it said is in .*output.txt"
    with Processes() as processes, pytest.raises(TrainError, match=message):
        processes.do(part, tmp_path, result)
    assert not (tmp_path / result).exists() and "FileNotFoundError" in (tmp_path / "output.txt").read_text()
