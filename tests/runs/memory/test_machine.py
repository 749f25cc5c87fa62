"""The memory of this process and of the machine."""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import pytest
import torch

from deltaw.runs.memory import machine


def test_held_memory_grows_with_what_is_allocated() -> None:
    before = machine.held()
    size = 32 << 20
    with mmap.mmap(-1, size) as block:  # an allocator may have kept as much from earlier
        block.write(b"1" * size)
        assert machine.held() - before > 0.8 * size


def test_free_memory_is_within_the_machines_and_unknown_elsewhere() -> None:
    free = machine.free(torch.device("cpu"))
    assert free is not None and 0 < free <= psutil.virtual_memory().total
    assert machine.free(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("limit", "used", "left"), [("max", "5", None), ("1000", "300", 700), ("1000", "1200", 0), ("", "", None)]
)
def test_a_containers_limit_counts(limit: str, used: str, left: int | None, tmp_path: Path) -> None:
    for name, text in (("limit", limit), ("used", used)):
        (tmp_path / name).write_text(f"{text}\n")
    assert machine.left_in_group(tmp_path / "limit", tmp_path / "used") == left
    assert machine.left_in_group(tmp_path / "none", tmp_path / "used") is None


def test_the_machine_is_described_in_a_line() -> None:
    environment = machine.describe()
    line = machine.in_words(environment)
    assert environment["versions"]["torch"] in line and environment["memory_gib"] > 0


def test_the_foot_says_date_versions_machine_and_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "sys.argv", ["/opt/x/deltaw/__main__.py", "train", str(tmp_path / "model"), "a b.jsonl", "--steps", "3"]
    )
    environment = machine.describe()
    foot = machine.foot(environment)
    for part in (environment["date"][:10], environment["processor"], "Python 3.", "GiB of memory", "transformers "):
        assert part in foot
    assert foot.endswith("deltaw train …/model 'a b.jsonl' --steps 3") and str(tmp_path) not in foot


def test_other_programs_have_no_command() -> None:
    assert machine.command(["/usr/bin/pytest", "-q"]) is None and machine.command([""]) is None
    assert machine.command(["/usr/local/bin/deltaw", "eval", "m", "--adapter=/x/y"]) == "deltaw eval m --adapter=…/y"


def test_a_path_in_the_working_folder_is_told_from_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert machine.placeless(str(tmp_path / "runs" / "a")) == "runs/a" and machine.placeless("runs/a") == "runs/a"
