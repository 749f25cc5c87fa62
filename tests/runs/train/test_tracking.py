"""What trackers hear of a run, and that none of them costs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw import TrainConfig
from deltaw.errors import ConfigError, TrainError
from deltaw.runs.train.tracking import trackers_of
from deltaw.training.events import Warned

tracking = pytest.importorskip("accelerate.tracking", reason="accelerate is not installed")


class Lines(tracking.GeneralTracker):  # type: ignore[misc]
    """A tracker that writes a line for all that it hears."""

    name = "lines"
    requires_logging_directory = True
    fails_at: str | None = None

    def __init__(self, run_name: str, logging_dir: Path) -> None:
        super().__init__()
        self.run_name, self.path = run_name, Path(logging_dir) / "lines.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path

    def start(self) -> None:
        self._hear("start", self.run_name)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._hear("settings", values)

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self._hear("log", values, step)

    def finish(self) -> None:
        self._hear("finish")

    def _hear(self, what: str, *heard: Any) -> None:
        if what == self.fails_at:
            raise OSError("the network is down")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps([what, *heard]) + "\n")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> type[Lines]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "lines", Lines)
    monkeypatch.setattr(Lines, "fails_at", None)
    return Lines


def quick(place: Path, out: Path, **settings: Any) -> tuple[Path, Path, TrainConfig]:
    return place / "model", place / "data.jsonl", TrainConfig(
        **{"out": str(out), "steps": 4, "log_every": 2, "eval_every": 2, "samples": 0, "track": "lines", **settings}
    )  # fmt: skip


def heard(run: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (run / "tracks" / "lines.jsonl").read_text().splitlines()]


def test_a_tracker_hears_of_steps_evaluations_and_scores(place: Path, tmp_path: Path, lines: type[Lines]) -> None:
    result = deltaw.train(*quick(place, tmp_path / "mine"), progress=False)
    start, settings, *logged, finish = heard(result.folder)
    assert start == ["start", "mine"] and finish == ["finish"]
    assert settings[1]["steps"] == 4 and settings[1]["method"] == "lora" and isinstance(settings[1]["lr"], float)
    steps = {step: values["train/loss"] for _, values, step in logged if "train/loss" in values}
    assert steps == {event["step"]: event["loss"] for event in result.log if event["event"] == "step"}
    held_out = {step: values for _, values, step in logged if "held_out/loss" in values}
    assert list(held_out) == [0, 2, 4] and "held_out/accuracy" not in held_out[0]
    kept = next(values for _, values, _ in logged if "kept/loss" in values)
    assert result.outcome.held_out is not None and kept["kept/loss"] == result.outcome.held_out.scores["loss"].value


def test_a_run_that_is_replaced_takes_its_tracks_with_it(place: Path, tmp_path: Path, lines: type[Lines]) -> None:
    deltaw.train(*quick(place, tmp_path / "run"), progress=False)
    again = deltaw.train(*quick(place, tmp_path / "run", overwrite=True), progress=False)
    assert [line[0] for line in heard(again.folder)].count("start") == 1
    deltaw.train(*quick(place, tmp_path / "run", overwrite=True, track="none"), progress=False)
    assert not (tmp_path / "run" / "tracks").exists()


@pytest.mark.parametrize("call", ["log", "finish"])
def test_a_tracker_that_fails_is_told_no_more_and_costs_nothing(
    place: Path, tmp_path: Path, lines: type[Lines], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(lines, "fails_at", call)
    events: list[Any] = []
    result = deltaw.train(*quick(place, tmp_path / "run"), progress=False, on_event=events.append)
    assert result.state.step == 4
    said = [event.text for event in events if isinstance(event, Warned) and "told no more" in event.text]
    assert said == ["lines is told no more of this run: the network is down"]


def test_a_tracker_that_does_not_start_is_an_error_before_anything_is_trained(
    place: Path, tmp_path: Path, lines: type[Lines], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "fails_at", "start")
    with pytest.raises(TrainError, match="lines could not be started: the network is down\nMend that"):
        deltaw.train(*quick(place, tmp_path / "run"), progress=False)
    assert not (tmp_path / "run" / "adapter").exists()


def test_trackers_that_are_unknown_or_not_installed_are_all_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        deltaw.train(*quick(place, tmp_path / "run", track="wandbb,comet_ml"), progress=False)
    assert len(caught.value.problems) == 2
    assert "wandbb: there is no such tracker" in str(caught.value) and "pip install comet_ml" in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert trackers_of("none") == []


@pytest.mark.parametrize("study", [deltaw.sweep, deltaw.compare])
def test_candidates_are_not_tracked(study: Any, place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trackers hear of one run"):
        study(str(place / "model"), place / "data.jsonl", TrainConfig(out=str(tmp_path / "s"), track="tensorboard"))


def test_tensorboard_can_read_it(place: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    result = deltaw.train(*quick(place, tmp_path / "run", track="auto"), progress=False)
    read = accumulator.EventAccumulator(str(result.folder / "tracks" / "run")).Reload()
    assert [point.step for point in read.Scalars("train/loss")] == [1, 2, 4]
