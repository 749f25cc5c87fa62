"""Help as it is read in terminals of several widths, of every command and of every method."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from deltaw.cli.flags import COMMANDS, COMMON, EXAMPLES, SECTIONS, train_with
from deltaw.cli.usage import flags_of, groups
from deltaw.cli.words import parse
from deltaw.methods.registry import METHODS
from tests.cli.conftest import Run

HELP = [*COMMANDS, *(f"train --method {method}" for method in METHODS)]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", ["", *HELP])
def test_help_is_folded_between_words(command: str, width: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    help_text = run(*command.split(), "--help").stdout
    example = f"  {EXAMPLES[command.split()[0]]}" if command else ""  # it is whole, so that it can be copied
    assert all(len(line) <= width for line in help_text.splitlines() if line != example)
    words = " ".join(help_text.split())
    doc = COMMANDS[command.split()[0]].__doc__ or "" if command else "ΔW: train, keep, switch, merge and exactly undo"
    assert " ".join(doc.split()) in words


@pytest.mark.parametrize("command", HELP)
def test_help_has_an_example_and_plain_words_for_values(
    command: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    help_text = run(*command.split(), "--help").stdout
    assert f"Example:\n  {EXAMPLES[command.split()[0]]}\n" in help_text
    for word in ("{", "None", "STR", "INT", "FLOAT", "PATH|", "''", "False", "True", "MISSING", "Sequence", "factory"):
        assert word not in help_text.replace("{prompt, completion}", ""), word
    assert help_text.count("Run Python code that comes with") <= 1


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_is_a_line_that_the_command_takes(command: str) -> None:
    program, *words = shlex.split(EXAMPLES[command])
    assert program == "deltaw" and words[0] == command and len(EXAMPLES[command]) < 90
    assert type(parse(words)) is COMMANDS[command]


@pytest.mark.parametrize("command", HELP)
def test_every_flag_stands_once_and_says_what_it_is(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    name, *method = command.split()
    flags = list(flags_of(train_with(method[-1]) if method else COMMANDS[name]))
    assert sorted(flag.name for members in groups(name, flags).values() for flag in members) == sorted(
        f.name for f in flags
    )
    lines = [line.strip() for line in run(*command.split(), "--help").stdout.splitlines()]
    for flag in flags:
        starts = [line for line in lines if line.removeprefix("-o, ").split(" ")[0] == flag.word]
        assert flag.text.endswith((".", ".)")), flag.name
        assert len(starts) == (2 if flag.positional == "DATA" and len(starts) == 2 else 1), (flag.word, starts)


def test_common_flags_come_first_and_are_those_of_the_command() -> None:
    for command, names in COMMON.items():
        flags = list(flags_of(COMMANDS[command]))
        assert set(names.split()) <= {flag.name for flag in flags}, command
        assert next(t for t in groups(command, flags) if t != "Arguments") == "Common"
    titles = list(groups("train", list(flags_of(COMMANDS["train"]))))
    assert titles == [
        "Arguments",
        "Common",
        "Method",
        "Optimization",
        "Held-out records",
        "Records",
        "Machine",
        "Run folder",
    ]


def test_every_command_is_in_a_section() -> None:
    assert sorted(" ".join(SECTIONS.values()).split()) == sorted(COMMANDS) == sorted(EXAMPLES)


def test_values_and_defaults_are_in_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    train = " ".join(run("train", "--help").stdout.split())
    assert "--lr NUMBER" in train and "(default: 0.0005)" in train and "--alpha NUMBER" in train
    assert "(default: each layer's rank)" in train and "--template auto|chat|plain" in train
    assert "(default: runs/compare)" in " ".join(run("compare", "--help").stdout.split())
    assert "Number of seeds per rank, with --confirm. (default: 1)" in " ".join(run("rank", "--help").stdout.split())
    assert "--base / --no-base Score the base too. (default: yes)" in " ".join(run("eval", "--help").stdout.split())
    assert "-o, --out PATH Folder to write. (required)" in " ".join(run("merge", "--help").stdout.split())


def test_names_that_a_flag_takes_are_listed(run: Run) -> None:
    help_text = " ".join(run("plan", "--help").stdout.split())
    assert "houlsby, pfeiffer" in help_text and "roberta-base, roberta-large" in help_text


def test_flags_that_are_off_can_be_said_to_be_off(run: Run) -> None:
    assert run("inspect", "nothing", "--no-json").returncode == 5


def test_version_exit_codes_and_completion_stand_in_help(run: Run) -> None:
    help_text = " ".join(run("--help").stdout.split())
    assert "--version" in help_text and "130 Ctrl-C" in help_text and "_DELTAW_COMPLETE=bash_source" in help_text


def completed(*words: str) -> list[str]:
    """What a shell is told to complete the last word to."""
    variables = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1), "_DELTAW_COMPLETE": "bash_complete"}
    code = "import os, sys; os.environ.update(eval(sys.argv[1])); sys.argv[1:] = []; from deltaw.cli import main; sys.exit(main())"
    process = subprocess.run([sys.executable, "-c", code, repr(variables)], capture_output=True, text=True, check=False)
    return [line.partition(",")[2] for line in process.stdout.splitlines()]


def test_a_shell_completes_commands_flags_and_choices() -> None:
    assert completed("deltaw", "ext") == ["extract"]
    assert {"--lr", "--lr-ratio"} <= set(completed("deltaw", "train", "--lr"))
    assert completed("deltaw", "train", "--schedule", "co") == ["cosine", "constant"]
