"""Notices: who hears them, under which name, and what public calls draw."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw import progress
from deltaw.progress import HeldOut, Notice, Phase, Runs, Stopping, Tick
from deltaw.runs.resume.signals import asked_to_stop
from deltaw.runs.train import train
from deltaw.training.events import Evaluated, Stepped
from tests.data.conftest import write_chat_model
from tests.training.test_tasks import TEXTS, about, folder_of

RECORDS = [{"prompt": f"{n} and one?", "completion": f" {n + 1}"} for n in range(24)]


def config(out: Path, **settings: Any) -> deltaw.TrainConfig:
    return deltaw.TrainConfig(**{"out": str(out), "samples": 0, "dtype": "float32", "batch": 4, **settings})


def heard(model: str, data: Any, settings: deltaw.TrainConfig) -> tuple[list[Notice], list[Any]]:
    notices: list[Notice] = []
    events: list[Any] = []
    with progress.watched(notices.append):
        train(model, data, settings, method=deltaw.LoRA(rank=2), on_event=events.append)
    return notices, events


def test_every_step_is_told_whatever_the_log_has(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "model")
    notices, events = heard(str(tmp_path / "model"), RECORDS, config(tmp_path / "run", steps=7, log_every=100))
    ticks = [notice for notice in notices if isinstance(notice, Tick)]
    assert [tick.step for tick in ticks] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.step for event in events if isinstance(event, Stepped)] == [1, 7]  # the log is as before
    last = ticks[-1]
    assert last.loss is not None and last.total_steps == 7 and last.seconds_left == 0 and last.memory > 1e6
    assert last.epoch == pytest.approx(7 * 4 / len(RECORDS), rel=0.3)
    phases = list(dict.fromkeys(notice.text for notice in notices if isinstance(notice, Phase)))
    order = [
        "reading the records",
        "loading the model",
        "encoding the records",
        "measuring memory",
        "scoring the held-out records",
    ]
    assert [text for text in phases if text in order] == order
    assert phases[-3:] == ["saving the adapter", "scoring", "writing the report"] and "taking the first step" in phases


def test_held_out_classes_have_an_accuracy_and_texts_have_none(tmp_path: Path) -> None:
    base = folder_of(TEXTS["bert"], tmp_path)
    notices, events = heard(base, about(60), config(tmp_path / "run", epochs=6, batch=8, lr=0.02, valid_share=0.2))
    held_out = [notice for notice in notices if isinstance(notice, HeldOut)]
    assert [n.loss for n in held_out] == [e.valid_loss for e in events if isinstance(e, Evaluated)]
    assert held_out[-1].accuracy == 1.0 and held_out[-1].loss < 0.3
    assert held_out[0].accuracy is not None and held_out[0].accuracy < 1.0
    write_chat_model(tmp_path / "model")
    notices, _ = heard(str(tmp_path / "model"), RECORDS, config(tmp_path / "other", steps=1))
    assert {notice.accuracy for notice in notices if isinstance(notice, HeldOut)} == {None}


def test_a_signal_is_told_before_the_step_is_over() -> None:
    notices: list[Notice] = []
    with progress.watched(notices.append), asked_to_stop():
        signal.raise_signal(signal.SIGINT)
        assert notices == [Stopping()]


def test_notices_get_the_name_of_their_run_and_reach_another_process_as_they_are() -> None:
    notices: list[Notice] = []
    tick = Tick(1, 2, 0.5, None, 1e-3, 10, 0.1, 0.1, 100, run="0")
    with progress.watched(notices.append), progress.named(lambda run: {"0": "r = 4"}.get(run, run)):
        progress.tell(tick)
        progress.say("scoring", 1, 3)
    assert [notice.run for notice in notices] == ["r = 4", ""]
    for notice in (*notices, Runs(3), HeldOut(1, 0.5, None), Stopping()):
        assert progress.from_json(progress.to_json(notice)) == notice
    progress.tell(tick)  # nobody watches
    assert len(notices) == 2


@pytest.mark.parametrize("drawn", [True, False])
def test_a_public_call_is_shown_on_standard_error_unless_that_is_turned_off(
    drawn: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_chat_model(tmp_path / "model")
    deltaw.train(str(tmp_path / "model"), RECORDS, config(tmp_path / "warm", steps=1), progress=False)
    capfd.readouterr()  # what libraries print as they are imported
    events: list[Any] = []
    settings = config(tmp_path / "run", steps=4, log_every=2)
    deltaw.train(str(tmp_path / "model"), RECORDS, settings, progress=drawn, on_event=events.append)
    told = capfd.readouterr()
    assert told.out == "" and [event.step for event in events if isinstance(event, Stepped)] == [1, 2, 4]
    assert "\x1b" not in told.err and "\r" not in told.err
    if drawn:
        assert [line.split()[1] for line in told.err.splitlines() if line.startswith("step") and "lr" in line] == [
            "1/4",
            "2/4",
            "4/4",
        ]
    else:
        assert told.err == ""


def test_studies_are_silent_without_progress_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_chat_model(tmp_path / "model")
    settings = config(tmp_path / "sweep", steps=2, valid_most=4)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}?", "completion": " {n}"}}\n' for n in range(24)))
    options = deltaw.SweepConfig(ranks="2,1", targets="q", test_most=4)
    capfd.readouterr()
    deltaw.sweep(str(tmp_path / "model"), str(data), settings, options, progress=False)
    deltaw.choose_rank(tmp_path / "sweep" / "runs" / next((tmp_path / "sweep" / "runs").iterdir()).name, progress=False)
    assert capfd.readouterr() == ("", "")
    result = deltaw.sweep(
        str(tmp_path / "model"), str(data), config(tmp_path / "again", steps=2, valid_most=4), options
    )
    told = capfd.readouterr()
    assert told.out == "" and told.err.count("held-out loss") == 2 and "\x1b" not in told.err
    assert 3 <= len(repr(result).splitlines()) <= 8 and str(result.report) in repr(result)
