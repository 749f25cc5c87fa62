"""Parts in processes of their own: forks of one that has imported everything, or new ones. Each ends with what started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from deltaw import progress
from deltaw.errors import Interrupted, TrainError
from deltaw.runs import apart, worker
from deltaw.runs.apart import Processes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")]


def task(place: Path, folder: Path, **run: object) -> Path:
    """Write the task of a candidate into a folder."""
    folder.mkdir()
    values = {
        "name": "lora", "method": "lora", "settings": {"rank": 2}, "model": str(place / "model"),
        "train": str(place / "data.jsonl"), "test": str(place / "data.jsonl"), "metrics": ["loss"],
        "run": {"steps": 3, "samples": 0, "valid": str(place / "data.jsonl"), "split": None, **run}, "valid_metrics": [],
    }  # fmt: skip
    (folder / worker.CANDIDATE).write_text(json.dumps(values))
    return folder


def scores(folder: Path) -> object:
    return json.loads((folder / worker.SCORE).read_text())["scores"]


def server() -> psutil.Process:
    (found,) = [child for child in psutil.Process().children() if apart.__name__ in child.cmdline()]
    return found


def when(folder: Path, do: object) -> None:
    """Call `do` once the run in a folder has kept two states."""

    def wait() -> None:
        while not (folder / "run" / "state.before.safetensors").exists():
            time.sleep(0.05)
        assert callable(do)
        do()

    threading.Thread(target=wait, daemon=True).start()


def test_one_server_forks_part_after_part_whatever_becomes_of_them(place: Path, tmp_path: Path) -> None:
    endless = {"steps": 100_000, "save_every": 50}
    with Processes() as processes:
        processes.do("candidate", task(place, tmp_path / "first"), worker.SCORE)
        forker = server()
        killed = task(place, tmp_path / "killed", **endless)
        when(killed, lambda: forker.children()[0].kill())
        with pytest.raises(TrainError, match="ended with -9 and no result"):
            processes.do("candidate", killed, worker.SCORE)
        stopped = task(place, tmp_path / "stopped", **endless)
        when(stopped, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted) as ended:
            processes.do("candidate", stopped, worker.SCORE)
        assert ended.value.exit_code == 143 and not (stopped / worker.SCORE).exists()
        broken = tmp_path / "broken"
        broken.mkdir()
        for part, result in (("candidate", worker.SCORE), ("timing", worker.LATENCY)):
            (broken / result).write_text("{}")  # of other settings
            with pytest.raises(
                TrainError, match=f"The {part} ended with 1 and no result; what it said is in .*output.txt"
            ):
                processes.do(part, broken, result)
            assert not (broken / result).exists()
            assert "FileNotFoundError" in (broken / "output.txt").read_text()
        processes.do("candidate", task(place, tmp_path / "last"), worker.SCORE)
        assert server() == forker
    assert not forker.is_running()
    assert scores(tmp_path / "first") == scores(tmp_path / "last")


@pytest.mark.parametrize("forks", [True, False])
def test_no_code_of_the_working_folder_runs(
    forks: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be a stranger's: `python -m` looks there first."""
    for name in ("xxhash", "statistics"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(apart, "_can_fork", lambda: forks)
    monkeypatch.setenv("PYTHONPATH", "")  # an empty entry is the working folder, too
    with Processes() as processes:
        processes.do("candidate", task(place, tmp_path / "a"), worker.SCORE)
    assert not (tmp_path / "ran").exists()


def test_a_new_process_does_the_same(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on other systems, and with a GPU."""
    monkeypatch.setattr(apart, "_can_fork", lambda: False)
    folder = task(place, tmp_path / "a", steps=100_000, save_every=50)
    when(folder, lambda: os.kill(os.getpid(), signal.SIGINT))
    with Processes() as processes, pytest.raises(Interrupted) as ended:
        processes.do("candidate", folder, worker.SCORE)
    assert ended.value.exit_code == 130 and (folder / "run" / "state.safetensors").exists()


ALONE = """
import sys
from pathlib import Path
from deltaw.runs.apart import Processes
with Processes() as processes:
    processes.do("candidate", Path(sys.argv[1]), "score.json")
"""


def test_nothing_outlives_a_parent_that_is_killed(place: Path, tmp_path: Path) -> None:
    """Also where its script has no `if __name__ == "__main__"`."""
    folder = task(place, tmp_path / "a", steps=100_000, save_every=50)
    (tmp_path / "script.py").write_text(ALONE)
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py", folder])
    while not (folder / "run" / "state.safetensors").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 2
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(family, timeout=60)[1]


@pytest.mark.parametrize("forks", [True, False])
def test_a_part_tells_what_it_is_doing(
    forks: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "_can_fork", lambda: forks)
    notices: list[progress.Notice] = []
    folder = task(place, tmp_path / "a", steps=300, log_every=1000)
    with Processes() as processes, progress.watched(notices.append), progress.named(lambda _: "lora"):
        processes.do("candidate", folder, worker.SCORE)
    ticks = [notice for notice in notices if isinstance(notice, progress.Tick)]
    assert ticks and [tick.step for tick in ticks] == sorted({tick.step for tick in ticks})
    assert {notice.run for notice in notices} == {"lora"} and not (folder / worker.NOW).exists()
