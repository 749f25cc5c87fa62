"""What `deltaw doctor` finds, and what it advises of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltaw.cli import main
from deltaw.runs.survey import doctor
from deltaw.runs.survey.doctor import Checkup, Fact, checkup


def test_versions_threads_disks_and_fast_ways_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    seen = checkup()
    assert torch.get_num_threads() == threads
    facts = {fact.name: fact.value for section in seen.sections.values() for fact in section}
    assert facts["torch"] == torch.__version__
    assert "GFLOP/s" in facts["float32 products"] and str(tmp_path) in facts["this folder"]
    assert {"device", "bfloat16", "memory", "cores", "threads", "gguf"} <= facts.keys()
    assert json.loads(json.dumps(seen.to_json()))["Versions"][0]["name"] == "deltaw"


@pytest.mark.parametrize(
    ("threads", "allowed", "gain", "advice"),
    [
        (2, 2.0, 1.8, ""),
        (1, 1.0, 1.0, ""),
        (8, 2.0, 0.4, "export OMP_NUM_THREADS=2"),
        (4, 1.5, 1.0, "export OMP_NUM_THREADS=1"),
        (1, 8.0, 1.0, "OMP_NUM_THREADS is 1): export OMP_NUM_THREADS=8"),
        (4, 4.0, 1.1, "something else uses the cores"),
    ],
)
def test_threads_that_do_not_fit_the_cores_are_named(
    threads: int, allowed: float, gain: float, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    said = doctor._thread_advice(threads, allowed, gain)
    assert (advice in said) if advice else not said


def test_a_quota_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(doctor, "_QUOTA", quota)
    without = doctor._allowed()
    quota.write_text("50000 100000\n")
    assert doctor._allowed() == 0.5
    quota.write_text("max 100000\n")
    assert doctor._allowed() == without


def test_a_full_disk_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LITTLE", 1 << 60)
    advised = [fact.name for fact in doctor._room() if fact.advice]
    assert advised == ["memory", "this folder", "models of the hub", "temporary"]


def test_the_command_prints_the_facts_and_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"Versions": [Fact("torch", "1.0", "It is old.")], "Memory and disk": [Fact("memory", "2 GB")]}
    monkeypatch.setattr(doctor, "checkup", lambda: Checkup(sections))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "  torch  1.0" in out and "What to do\n  torch: It is old." in out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"] == ["torch: It is old."]
