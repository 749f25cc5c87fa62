"""`deltaw eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.cli import main
from tests.cli.conftest import WORDS, Run


def test_base_and_adapter_are_scored_side_by_side(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(place / "model"), str(place / "data.jsonl"), "--adapter", str(place / "run" / "adapter")]
    assert main([*words, "--max-new-tokens", "6", "--out", str(tmp_path / "scores.json")]) == 0
    text = capsys.readouterr().out
    assert "base" in text and "adapter" in text and "rouge l" in text
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["adapter"]["scores"]["loss"]["value"] < found["base"]["scores"]["loss"]["value"]
    loss = found["base"]["scores"]["loss"]
    assert loss["low"] < loss["value"] < loss["high"]


def test_texts_have_no_scores_of_answers(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{w} and so on"}) + "\n" for w in WORDS))
    assert main(["eval", str(place / "model"), str(tmp_path / "texts.jsonl")]) == 0
    text = capsys.readouterr().out
    assert "perplexity" in text and "bleu" not in text
    assert main(["eval", str(place / "model"), str(tmp_path / "texts.jsonl"), "--metrics", "bleu"]) == 6
    assert "has no prompt" in capsys.readouterr().err


def test_the_scores_as_json(place: Path, run: Run) -> None:
    words = ["eval", place / "model", place / "data.jsonl", "--adapter", place / "run" / "adapter", "--metrics", "loss"]
    scores = json.loads(run(*words, "--json").stdout)
    assert scores.keys() == {"base", "adapter"} and "predictions" not in scores["base"]
    assert scores["adapter"]["scores"]["loss"]["low"] <= scores["adapter"]["scores"]["loss"]["value"]


@pytest.mark.parametrize("flags", [["--max-records", 3], ["--most", 3], ["--most", 3, "--max-records", 5]], ids=str)
def test_the_most_records_bound_what_is_scored(flags: list[object], place: Path, run: Run) -> None:
    """--max-records was taken and did nothing."""
    done = run("eval", place / "model", place / "data.jsonl", "--metrics", "loss", "--json", *flags)
    assert json.loads(done.stdout)["base"]["records"] == 3
