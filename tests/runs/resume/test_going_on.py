"""Runs that are resumed and die again at once, with other lengths or in other folders: the state they went on from is kept."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw.errors import ConfigError, Interrupted
from deltaw.runs.resume.place import RunFolder
from deltaw.runs.resume.signals import asked_to_stop
from deltaw.training import keeper
from deltaw.training.events import Event, Resumed, Stepped, Warned
from deltaw.training.keeper import BEFORE, NEWEST, read_states
from tests.runs.test_resume import Killed, Stop, same, settings


def by_time(out: Path, **changes: Any) -> deltaw.TrainConfig:
    """Settings of a run so short that no state is due before its end."""
    return settings(out, save_every=None, log_every=1, eval_every=None, **changes)


def kill(event: Event) -> None:
    if isinstance(event, Stepped):
        raise Killed


@pytest.fixture
def stopped(place: Path, tmp_path: Path) -> Path:
    """A run that was stopped after 7 of 12 steps, in a folder whose name has a space."""
    out = tmp_path / "a run"
    with pytest.raises(Interrupted, match=r"deltaw train --resume '.*a run'"):
        deltaw.train(str(place / "model"), place / "data.jsonl", by_time(out), on_event=Stop(7))
    return out


def resumed(out: Path, **arguments: Any) -> list[int]:
    """Resume a run; return the steps after which it says it was."""
    events: list[Event] = []
    deltaw.train(resume=out, on_event=events.append, **arguments)
    return [event.step for event in events if isinstance(event, Resumed)]


def test_a_longer_run_that_died_before_its_next_state_goes_on(stopped: Path) -> None:
    with pytest.raises(Killed):
        deltaw.train(resume=stopped, config=by_time(stopped, steps=20), resume_with=["steps"], on_event=kill)
    assert resumed(stopped) == [7]


def test_a_run_that_moved_and_died_goes_on_where_it_is(stopped: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        deltaw.train(resume=stopped, config=by_time(tmp_path / "b"), resume_with=["out"], on_event=kill)
    assert resumed(tmp_path / "b") == [7]
    deltaw.train(str(place / "model"), place / "data.jsonl", by_time(tmp_path / "whole"))
    same(tmp_path / "b", tmp_path / "whole")


def test_a_damaged_state_never_takes_the_place_of_a_good_one(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(Interrupted):
        deltaw.train(str(place / "model"), place / "data.jsonl", settings(out), on_event=Stop(7))
    steps = [kept.saved.step for kept in read_states(out)]
    (out / NEWEST).write_bytes((out / NEWEST).read_bytes()[:-5])
    with pytest.raises(Killed):
        deltaw.train(resume=out, config=settings(out, save_every=None, log_every=1), on_event=kill)
    assert [kept.saved.step for kept in read_states(out)] == steps[1:]
    assert (out / NEWEST).exists() and not (out / BEFORE).exists()


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_is_not_resumed_with_fewer_steps_than_it_took(finished: bool, stopped: Path) -> None:
    if finished:
        deltaw.train(resume=stopped)
    with pytest.raises(ConfigError, match=r"has taken (7|12) steps already"):
        deltaw.train(resume=stopped, config=by_time(stopped, steps=5), resume_with=["steps"])
    assert "steps: 12" in (stopped / "config.yaml").read_text()


def test_a_finished_run_without_a_state_stays_as_it_is(stopped: Path) -> None:
    """Studies remove the states of their candidates."""
    deltaw.train(resume=stopped)
    RunFolder(stopped).forget_states()
    before = (stopped / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"--start .*adapter"):
        deltaw.train(resume=stopped)
    assert (stopped / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_run_that_begins_anew_says_so(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(Killed):
        deltaw.train(str(place / "model"), place / "data.jsonl", by_time(out), on_event=kill)
    events: list[Event] = []
    deltaw.train(resume=out, on_event=events.append)
    assert any("begins anew" in event.text for event in events if isinstance(event, Warned))


def test_the_new_folder_lies_in_no_input_and_not_in_the_run(stopped: Path, place: Path) -> None:
    for out in (place / "model", stopped / "next"):
        before = sorted(out.rglob("*"))
        with pytest.raises(ConfigError, match="nothing was touched"):
            deltaw.train(resume=stopped, config=by_time(out, overwrite=True), resume_with=["out"])
        assert sorted(out.rglob("*")) == before


def test_nothing_writes_into_the_folder_once_the_run_has_let_go_of_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = keeper.write_state

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)
        write(*arguments)

    def interrupt(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(keeper, "write_state", slow)
    with pytest.raises(KeyboardInterrupt):
        deltaw.train(
            str(place / "model"), place / "data.jsonl", settings(tmp_path / "a", save_every=2, log_every=1), on_event=interrupt
        )  # fmt: skip
    assert not [thread for thread in threading.enumerate() if thread.name == "deltaw state"]
    assert [kept.saved.step for kept in read_states(tmp_path / "a")] == [2]


def test_a_run_with_relative_names_goes_on_from_another_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(place / "model")
    for name in ("data.jsonl", "valid.jsonl"):
        (tmp_path / name).symlink_to(place / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Interrupted):
        deltaw.train("model", "data.jsonl", by_time(Path("runs/a"), valid="valid.jsonl"), on_event=Stop(7))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resumed(Path("../runs/a")) == [7]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_with_the_first_ones_code(signum: int) -> None:
    with pytest.raises((Interrupted, KeyboardInterrupt)) as ended, asked_to_stop():
        for _ in range(2):
            os.kill(os.getpid(), signum)
            time.sleep(0.05)
    code = ended.value.exit_code if isinstance(ended.value, Interrupted) else 130
    assert code == 128 + signum


def test_a_full_disk_ends_a_run_with_one_error(place: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    out, (soft, hard) = tmp_path / "a", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((out / "log.jsonl").stat().st_size + 10, hard))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
            with pytest.raises(deltaw.DeltaWError, match=r"log.jsonl could not be written: File too large.*goes on"):
                deltaw.train(str(place / "model"), place / "data.jsonl", settings(out, log_every=1), on_event=fill)
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert resumed(out) != []
    deltaw.train(str(place / "model"), place / "data.jsonl", settings(tmp_path / "whole", log_every=1))
    same(out, tmp_path / "whole")
