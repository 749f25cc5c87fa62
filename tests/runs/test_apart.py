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


def test_a_fork_has_the_result_of_a_new_process(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Processes() as processes:
        for name in ("a", "b"):
            processes.do("candidate", task(place, tmp_path / name), worker.SCORE)
        (server,) = [child for child in psutil.Process().children() if apart.__name__ in child.cmdline()]
    assert not server.is_running()
    monkeypatch.setattr(apart, "_can_fork", lambda: False)
    with Processes() as processes:
        processes.do("candidate", task(place, tmp_path / "c"), worker.SCORE)
    assert scores(tmp_path / "a") == scores(tmp_path / "b") == scores(tmp_path / "c")


@pytest.mark.parametrize("forked", [True, False])
def test_a_signal_reaches_the_part_which_saves_its_state(
    forked: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not forked:
        monkeypatch.setattr(apart, "_can_fork", lambda: False)
    folder = task(place, tmp_path / "a", steps=100_000, save_every=50)

    def stop() -> None:
        while not (folder / "run" / "state.before.safetensors").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with Processes() as processes:
        with pytest.raises(Interrupted) as stopped:
            processes.do("candidate", folder, worker.SCORE)
        assert stopped.value.exit_code == 143
        assert not (folder / worker.SCORE).exists() and (folder / "run" / "state.safetensors").exists()
        processes.do("candidate", task(place, tmp_path / "b"), worker.SCORE)  # the server has outlived it


def test_a_part_that_is_killed_is_told_and_the_next_one_is_done(place: Path, tmp_path: Path) -> None:
    folder = task(place, tmp_path / "a", steps=100_000, save_every=50)

    def kill() -> None:
        while not (folder / "run" / "state.safetensors").exists():
            time.sleep(0.05)
        (server,) = [child for child in psutil.Process().children() if apart.__name__ in child.cmdline()]
        (part,) = server.children()
        part.kill()

    threading.Thread(target=kill, daemon=True).start()
    with Processes() as processes:
        with pytest.raises(TrainError, match="ended with -9 and no result"):
            processes.do("candidate", folder, worker.SCORE)
        processes.do("candidate", task(place, tmp_path / "b"), worker.SCORE)
    assert scores(tmp_path / "b")


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
