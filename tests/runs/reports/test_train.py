"""The commands that a run's report proposes."""

from __future__ import annotations

import shlex

from deltaw.runs.reports.train import next_commands


def test_commands_can_be_pasted_whatever_the_names() -> None:
    for command in next_commands("my model", "runs/it's one/adapter", {}):
        words = shlex.split(command)
        assert "my model" in words and "runs/it's one/adapter" in words
