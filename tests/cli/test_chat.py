"""`deltaw chat`."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run


def test_base_adapter_new_and_quit_are_commands_of_a_chat(place: Path, run: Run) -> None:
    words = ["chat", place / "model", "--adapter", place / "run" / "adapter", "--max-new-tokens", 4]
    done = run(*words, stdin="hi\n/base\nhi\n/what\n/new\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "Now the base alone" in done.stdout and "There is no /what" in done.stdout
    assert done.stdout.count("model ›") == 2


def test_a_conversation_over_the_models_positions_says_so_and_goes_on(place: Path, run: Run) -> None:
    done = run("chat", place / "model", "--max-new-tokens", 4, stdin="x" * 260 + "\nhi\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "256 positions" in done.stdout and "/new starts over" in done.stdout and done.stdout.count("model ›") == 1
