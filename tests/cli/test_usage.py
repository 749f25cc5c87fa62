"""Help as it is read in terminals of several widths."""

from __future__ import annotations

import pytest

from deltaw.cli.flags import COMMANDS
from tests.cli.conftest import Run


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", ["", "train", "plan", "rank", "verify"])
def test_help_is_folded_between_words(command: str, width: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    help_text = run(*command.split(), "--help").stdout
    assert all(len(line) <= width for line in help_text.splitlines())
    words = " ".join(help_text.split())
    doc = COMMANDS[command].__doc__ or "" if command else "ΔW: train, keep, switch, merge and exactly undo low-rank"
    assert " ".join(doc.split()) in words


def test_values_and_defaults_are_in_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for command in COMMANDS:
        help_text = run(command, "--help").stdout
        assert not any(word in help_text for word in ("None", "STR", "INT", "FLOAT", "''", "False", "True")), command
    assert "--lr NUMBER" in run("train", "--help").stdout and "(default: 0.0005)" in run("train", "--help").stdout
    assert "With --confirm: number of seeds per rank. (default: 1)" in run("rank", "--help").stdout
    assert "(default: yes)" in run("eval", "--help").stdout


def test_names_that_a_flag_takes_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    help_text = run("plan", "--help").stdout
    assert "houlsby, pfeiffer" in help_text and "roberta-base, roberta-large" in help_text


def test_flags_that_are_off_can_be_said_to_be_off(run: Run) -> None:
    assert run("inspect", "nothing", "--no-json").returncode == 5
