"""`deltaw chat`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_a_chat_is_steered_saved_and_asked_again(place: Path, tmp_path: Path, run: Run) -> None:
    saved = tmp_path / "chats.jsonl"
    lines = [
        "/retry", "/save", "/system Be brief.", "/temperature warm", "/temperature 1.5", "red and blue?", "/retry", "/retry",
        f"/save {saved}", "/system", "hi", f"/save {saved}", f"/save {tmp_path}", "/help", "/quit",
    ]  # fmt: skip
    done = run("chat", place / "model", "--max-new-tokens", 5, stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    for said in (
        "There is no answer yet",
        "There is nothing to save",
        "warm is no temperature",
        "cannot be written",
        "/retry",
    ):
        assert said in done.stdout
    first, second = (json.loads(line)["messages"] for line in saved.read_text().splitlines())
    assert [m["role"] for m in first] == ["system", "user", "assistant"] and first[0]["content"] == "Be brief."
    assert [m["role"] for m in second] == ["user", "assistant"] and second[0]["content"] == "hi"
    answers = done.stdout.split("model ›")[1:4]
    assert len({answer.split("you ›")[0] for answer in answers}) > 1  # asked again, it says other things


@pytest.mark.parametrize("end", ["/exit", "/bye", "/q", "/quit"])
def test_commands_have_other_programs_names_too(end: str, place: Path, run: Run) -> None:
    done = run("chat", place / "model", stdin=f"/clear\n/temp warm\n/regen\n/?\n{end}\nhi\n")
    assert done.returncode == 0 and "There is no /" not in done.stdout and "model ›" not in done.stdout
    assert "warm is no temperature" in done.stdout and "There is no answer yet" in done.stdout


@pytest.mark.parametrize(("answer", "what"), [("", "nothing: it ended at once"), (" \n", "nothing but white space")])
def test_a_model_that_says_nothing_is_told(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch, answer: str, what: str
) -> None:
    from deltaw.cli import chat

    monkeypatch.setattr(chat, "_generated", lambda *given: answer)
    done = run("chat", place / "model", stdin="hi\n")
    assert f"The model said {what}. /temperature" in done.stdout + done.stderr
