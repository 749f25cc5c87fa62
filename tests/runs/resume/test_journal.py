"""The log of a run: any text in its events, and a full disk."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from deltaw.errors import FileError
from deltaw.runs.resume.journal import Journal
from deltaw.training.events import Event, Spiked, Warned


def test_text_with_other_ends_of_lines_comes_back(tmp_path: Path) -> None:
    """Names of records' files, which spikes tell, may hold any."""
    events: list[Event] = [Spiked(3, 4.0, 1.0, None, ["a\u2028b\x85c\x0bd.jsonl:1"]), Warned(4, "e\u2029f")]
    with contextlib.closing(Journal(tmp_path / "log.jsonl", lambda event: None)) as journal:
        for event in events:
            journal.hear(event)
        kept = journal.position()
    with contextlib.closing(Journal(tmp_path / "log.jsonl", lambda event: None, kept)) as journal:
        assert journal.events == events and not journal.note


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_error_with_the_path() -> None:
    with (
        pytest.raises(FileError, match="/dev/full could not be written: No space left"),
        contextlib.closing(Journal(Path("/dev/full"), lambda event: None)) as journal,
    ):
        journal.hear(Warned(1, "x"))
