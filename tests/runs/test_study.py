"""What the candidates of a study share: its folder, and what they are scored by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltaw.config import DataConfig, TrainConfig
from deltaw.errors import ConfigError, DataError
from deltaw.runs import splits
from deltaw.runs.study import Scoring, bring_back, claimed, scoring_of, set_aside


def sets_of(folder: Path, **records: list[dict[str, str]]) -> Path:
    folder.mkdir()
    for name, rows in records.items():
        splits.file_of(folder, name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def asked(prompts: str) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": "x"} for prompt in prompts]


def test_texts_are_scored_and_chosen_by_their_loss(place: Path, tmp_path: Path) -> None:
    sets = sets_of(tmp_path / "sets", train=asked("abcab"), valid=asked("de"), test=asked("fgg"))
    scoring = scoring_of(sets, TrainConfig(), str(place / "model"), "")
    assert scoring.metrics == ("loss",) and scoring.chosen_by == "loss" and not scoring.warnings
    assert scoring.sets["train"] == "5 records of 3 prompts" and scoring.sets["test"] == "3 records of 2 prompts"


def test_prompts_in_two_sets_are_warned_of(place: Path, tmp_path: Path) -> None:
    sets = sets_of(tmp_path / "sets", train=asked("abc"), valid=asked("cd"), test=asked("ab"))
    warnings = scoring_of(sets, TrainConfig(), str(place / "model"), "").warnings
    assert ["held-out" in warnings[0], "test" in warnings[1], len(warnings)] == [True, True, 2]


def test_classes_that_training_never_shows_are_refused(place: Path, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    sets = sets_of(tmp_path / "sets", train=rows, valid=rows, test=[{"text": "c", "label": "z"}])
    with pytest.raises(DataError, match="there is no class 'z'"):
        scoring_of(sets, TrainConfig(), str(place / "model"), "")


@pytest.mark.parametrize(
    ("chosen_by", "best"), [("loss", "least loss"), ("accuracy", "most right"), ("spearman", "least loss")]
)
def test_runs_are_ordered_by_their_held_out_score_and_then_their_loss(chosen_by: str, best: str) -> None:
    """A score that is no number comes last; of a metric without scores the loss decides."""
    scoring = Scoring(DataConfig(), ("loss", chosen_by), chosen_by, {}, ())
    runs = {
        "least loss": (1.0, {"accuracy": 0.5, "spearman": 0.9}),
        "most right": (2.0, {"accuracy": 0.7, "spearman": float("nan")}),
        "as right": (3.0, {"accuracy": 0.7, "spearman": 0.9}),
    }
    assert min(runs, key=lambda name: scoring.order(*runs[name])) == best


def test_a_run_without_a_held_out_loss_comes_last() -> None:
    scoring = Scoring(DataConfig(), ("loss",), "loss", {}, ())
    assert scoring.order(None, {}) > scoring.order(9.0, {})


# --- the folder ---------------------------------------------------------------------------------------------------

SETTINGS = {"model": "m", "test_most": 9, "run": {"steps": 4, "seed": 0}}


def begun(folder: Path, settings: dict[str, Any] = SETTINGS) -> None:
    (folder / "runs").mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(settings))


def test_a_study_of_the_same_settings_is_resumed(tmp_path: Path) -> None:
    begun(tmp_path)
    assert claimed(tmp_path, "sweep", SETTINGS, overwrite=False)
    assert claimed(tmp_path, "sweep", SETTINGS, overwrite=True)


def test_a_study_of_other_settings_is_refused_and_they_are_named(tmp_path: Path) -> None:
    begun(tmp_path)
    other = {"model": "n", "test_most": 9, "run": {"steps": 5, "seed": 0}}
    with pytest.raises(ConfigError, match=r"a sweep with other settings \(steps, model\).*--overwrite"):
        claimed(tmp_path, "sweep", other, overwrite=False)
    assert not claimed(tmp_path, "sweep", other, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "runs"}, "asking changes nothing"


def test_a_study_of_which_no_run_was_begun_gives_way(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "runs").rmdir()
    assert not claimed(tmp_path, "sweep", SETTINGS | {"model": "n"}, overwrite=False)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        claimed(tmp_path, "sweep", SETTINGS, overwrite=False)


def test_what_is_replaced_is_set_aside_and_can_be_brought_back(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "thesis.txt").write_text("mine")
    set_aside(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"previous", "thesis.txt"}
    begun(tmp_path, SETTINGS | {"model": "n"})
    set_aside(tmp_path)  # the one that has results stays; the newer one has none
    assert json.loads((tmp_path / "previous" / "sweep.json").read_text()) == SETTINGS
    bring_back(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "runs", "results.json", "thesis.txt"}
