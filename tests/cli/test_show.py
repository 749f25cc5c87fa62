"""Tables, facts and sentences in terminals of any width."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from deltaw.cli import show
from deltaw.errors import visible


def test_a_path_is_on_one_line_of_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = "/a" * 50 + "/report.html"
    show.facts({"report": long, "held-out loss": "1.0"})
    assert capsys.readouterr().out == f"report         {long}\nheld-out loss  1.0\n"


def narrow(table: Any, width: int) -> list[str]:
    """The lines of a table in a terminal of this width."""
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as shown:
        console.print(table)
    return [line.rstrip() for line in shown.get().splitlines()]


def test_amounts_stay_whole_in_a_narrow_terminal() -> None:
    """They were broken within the number (2.8 over 92) to keep long names of layers on one line."""
    name, amounts = (
        "bert.encoder.layer.*.attention.output.dense",
        ["6", "384×1536", "8", "1", "2.892", "0.467", "0.4895"],
    )
    table = show.table("layer", "count", "d×k", "rank", "scale", "‖A‖", "‖B‖", "‖ΔW‖")
    table.add_row(name, *amounts)
    lines = narrow(table, 80)
    assert all(len(line) <= 80 for line in lines)
    shown = [line.split() for line in lines]
    assert [row for row in shown if row[-7:] == amounts], lines
    assert "".join(row[0] for row in shown if row[0] in name and row[0] != "layer") == name


@pytest.mark.parametrize("width", [30, 45, 70])
def test_columns_that_do_not_fit_follow_in_another_part(width: int) -> None:
    headers = ["parameters", "adapter", "share", "memory", "time per step", "latency", "accuracy", "matthews"]
    amounts = ["2,442,240", "9.8MB", "1.82%", "1.3GB", "0.8s", "1.02", "0.350 [0.233, 0.483]", "0.000 [0.000, 0.000]"]
    table = show.table("method", *headers)
    table.add_row("lora-qv", *amounts)
    lines = narrow(table, width)
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    for word in " ".join([*headers, *amounts]).split():
        assert word in words, (word, lines)
    assert words.count("lora-qv") == words.count("method") > 1
    assert narrow(table, width) == lines
    assert narrow(table, 200)[1].split() == ["lora-qv", *" ".join(amounts).split()]


def test_an_interval_is_not_broken() -> None:
    table = show.table("", "base", "adapter", "adapter less base")
    table.add_row("loss", "1.441 [0.796, 2.208]", "1.132 [0.481, 2.017]", "-0.310 [-0.522, -0.098]")
    lines = narrow(table, 70)
    assert all(len(line) <= 70 for line in lines)
    assert [re.split(r"\s{2,}", line.strip()) for line in lines[-2:]] == [
        ["loss", "1.441", "1.132", "-0.310"], ["[0.796, 2.208]", "[0.481, 2.017]", "[-0.522, -0.098]"],
    ]  # fmt: skip


def test_sentences_are_folded_between_words_in_a_terminal() -> None:
    """The terminal broke them within words; in a file each is one line."""
    for terminal, expected in (
        (True, ["/base and /adapter", "switch, /new starts", "over."]),
        (False, ["/base and /adapter switch, /new starts over."]),
    ):
        file = io.StringIO()
        show.prose(
            "/base and /adapter switch, /new starts over.",
            console=Console(file=file, width=20, force_terminal=terminal, highlight=False),
        )
        assert [line.rstrip() for line in file.getvalue().splitlines()] == expected


def test_headers_give_way_before_names_do() -> None:
    name = "model.layers.*.self_attn.q_proj"
    table = show.table("layers", "count", "‖ΔW‖ / ‖W0‖", "ΔW kept", "entries changed", "largest change")
    table.add_row(name, "30", "3.48e-04", "100.00%", "100.0%", "3.88e-04")
    lines = narrow(table, 80)
    assert lines[-1].split() == [name, "30", "3.48e-04", "100.00%", "100.0%", "3.88e-04"]
    assert max(map(len, lines)) <= 80


def test_the_title_of_a_narrow_table_is_one_line() -> None:
    """It was folded to the width of the table, which made three lines of it and broke paths."""
    table = show.table("", "base", title="\nreg.csv: 60 records of 60 items (95% intervals by bootstrap over [items])")
    table.add_row("loss", "2.178")
    assert narrow(table, 80) == [
        "", "reg.csv: 60 records of 60 items (95% intervals by bootstrap over [items])", "       base", "loss  2.178",
    ]  # fmt: skip


# --- text of strangers --------------------------------------------------------------------------------------------

HOSTILE = "\x1b[2Jgone \x07 \x9b31m \x1b]0;title\x07 \rover \u202egnp.exe [bold]b[/bold] [/q] :warning: \x7f\x08"
ORDINARY = "한국어 👩‍👩‍👧 e\u0301 עברית\u200f tab\there ‖ΔW‖ [a-z] C:\\x"


def obeyed(text: str) -> list[str]:
    """The characters of a text that a terminal would act on, besides rich's own colours."""
    return re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", re.sub("\x1b\\[[0-9;]*m", "", text))


def every_way(console: show.PlainConsole, text: str) -> None:
    """Print a text in each way that commands print."""
    console.print(text, soft_wrap=True)
    console.print(Text(text), style="dim")
    show.prose(text, style="yellow", console=console)
    table = show.table("name", text, title=text)
    table.add_row(text, text)
    console.print(table)
    with console.status(text) as status:
        status.update(text)
        console.print(status.renderable)
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    handler.handle(logging.LogRecord("deltaw", logging.WARNING, "", 0, "%s", (text,), None))


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec=None), max_size=40))
@example(HOSTILE)
@example("*[/q]_proj")
@example("[bold]")
@example("\ud800")
def test_no_text_is_obeyed_by_a_terminal(text: str) -> None:
    shown = io.StringIO()
    every_way(show.PlainConsole(file=shown, width=400), text)
    assert not obeyed(shown.getvalue())
    shown.getvalue().encode("utf-8")


def test_hostile_text_is_spelled_out_and_markup_is_text() -> None:
    shown = io.StringIO()
    show.PlainConsole(file=shown, width=400, force_terminal=True).print(HOSTILE, soft_wrap=True)
    line = shown.getvalue()
    assert (
        r"\x1b[2Jgone \x07 \x9b31m \x1b]0;title\x07 \x0dover \u202egnp.exe [bold]b[/bold] [/q] :warning: \x7f\x08"
        in line
    )


def test_ordinary_text_stays_as_it_is() -> None:
    shown = io.StringIO()
    console = show.PlainConsole(file=shown, width=400)
    console.print(ORDINARY.replace("\t", " "), soft_wrap=True)
    assert shown.getvalue() == ORDINARY.replace("\t", " ") + "\n"
    assert visible(ORDINARY + "\nnext\r\nlast") == ORDINARY + "\nnext\nlast"


def test_a_column_is_as_wide_as_what_is_shown_in_it() -> None:
    table = show.table("layer", "rank")
    table.add_row("\x1b[31mq", "8")
    table.add_row("k", "8")
    shown = io.StringIO()
    show.PlainConsole(file=shown, width=80).print(table)
    lines = shown.getvalue().splitlines()
    assert [line.rstrip()[-1] for line in lines[1:]] == ["8", "8"] and len(
        {len(line.rstrip()) for line in lines[1:]}
    ) == 1


@given(st.text(st.characters(codec=None), max_size=40))
@example(HOSTILE)
def test_json_reads_back_and_holds_nothing_to_obey(text: str) -> None:
    line = show.as_json({"a": text}, indent=None)
    assert json.loads(line) == {"a": text} and not obeyed(line)
    line.encode("utf-8")
    assert show.as_json(ORDINARY) == json.dumps(ORDINARY, ensure_ascii=False)
