"""Tables, facts and sentences in terminals of any width."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from deltaw.cli import show


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
