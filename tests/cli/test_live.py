"""The live view: what it says, at any width, and what goes to a pipe, a dumb terminal and a notebook."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.text import Text

from deltaw.cli import live, main, notebook, show
from deltaw.cli.lines import Lines
from deltaw.cli.now import Now
from deltaw.cli.terminal import Terminal, layout
from deltaw.progress import HeldOut, Phase, Runs, Stopping, Tick
from deltaw.runs.events import CandidateFinished, CandidateStarted
from deltaw.runs.results.study import Failed
from deltaw.training.events import Warned

HOSTILE = "<script>alert('x')</script> \x1b[2J [bold]b[/]"


def tick(step: int, **changes: Any) -> Tick:
    values = {
        "total_steps": 1200, "epoch": step / 400, "loss": 2.5, "lr": 1.5e-4, "tokens": 1000 * step, "step_seconds": 0.5 * step,
        "seconds_left": 4000.0, "memory": 12_300_000_000, "run": "default",
    }  # fmt: skip
    return Tick(step, **values | changes)


def trained(*, steps: int = 30) -> Now:
    now = Now("training")
    now.notice(HeldOut(0, 0.6884, 0.833))
    for step in range(1, steps + 1):
        now.notice(tick(step))
    return now


def study() -> Now:
    now = Now("sweep")
    now._began -= 600
    now.notice(Runs(12))
    now.hear(CandidateStarted("r = 64, attention", 0.001, 3))
    now.hear(CandidateFinished("r = 32, attention", 0.001, 3, Failed("not finite"), True))
    for step in range(1, 20):
        now.notice(tick(step, run="r = 64, attention, lr 0.001, seed 3"))
    return now


def drawn(now: Now, width: int) -> list[str]:
    file = io.StringIO()
    console = show.PlainConsole(file=file, width=width, force_terminal=True)
    for row in layout(now, width, Text("*")):
        console.print(row)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 120, 160, 200])
@pytest.mark.parametrize("state", ["first", "steps", "scoring", "stopping", "study"])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_lost(state: str, width: int) -> None:
    now = {"first": lambda: Now("training"), "study": study}.get(state, trained)()
    if state == "scoring":
        now.notice(Phase("scoring the held-out records", 100, 1000))
    elif state == "stopping":
        now.notice(Stopping())
    lines = drawn(now, width)
    assert lines and max(map(cell_len, lines)) <= width
    shown = " ".join(lines)
    for text in (*now.place(), *now.texts(), now.head):
        assert text in shown, (text, lines)
    assert len(lines) <= (5 if width < 80 else 3)
    if state in ("steps", "study"):
        assert "━" in lines[0] and cell_len(lines[0]) > width - 4  # the bar takes what there is


def test_the_figures_of_a_training() -> None:
    now = trained()
    assert now.place() == ["30/1200", "epoch 0.07", "1 h 06 min left"]
    assert now.texts() == [
        "loss 2.5000", "held out 0.6884", "accuracy 0.833", "lr 1.5e-04", "2,000 tokens/s", "memory 12.3 GB",
    ]  # fmt: skip
    now.notice(tick(31, loss=12.5, on_gpu=True))
    assert 2.5 < float(now.figures()["loss"]) < 4.5 and now.figures()["GPU"] == "12.3 GB"  # smoothed
    assert now.head == "training"
    now.notice(Phase("scoring the held-out records", 8, 32))
    assert now.head == "scoring the held-out records 8/32"
    now.notice(Stopping())
    assert now.head == "stopping after this step"
    now.notice(Phase("saving the adapter"))
    assert now.head == "saving the adapter"


def test_a_study_moves_with_the_steps_of_its_runs() -> None:
    now = study()
    assert now.bar is not None and now.bar.part == pytest.approx(1 + 19 / 1200) and now.bar.text == "1/12"
    now.notice(tick(20, run="other"))
    assert now.run()[0] == "r = 64, attention, lr 0.001, seed 3 and 1 more" and "mean loss" in now.figures()
    for name in ("r = 64, attention", "third"):
        now.hear(CandidateFinished(name, 0.001, 3, Failed("x"), True))
    assert now.bar.text == "3/12" and list(now.ticks) == ["other"]


def test_steps_are_taken_up_and_drawn_by_the_thread_alone() -> None:
    """However fast steps are: drawing is rich's, ten times a second."""
    file = io.StringIO()
    console = show.PlainConsole(file=file, width=100, force_terminal=True)
    view = Terminal("training", console=console, out=console)
    view._live.auto_refresh = False
    with view:
        before = len(file.getvalue())
        for step in range(1, 1001):
            view.notice(tick(step))
        assert len(file.getvalue()) == before
        view._live.refresh()
        assert "1000/1200" in file.getvalue()
    assert "trained" in file.getvalue()
    assert view._live.refresh_per_second == 10


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("COLORTERM", "truecolor")])
def test_no_color_is_heeded(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(variable, value)
    file = io.StringIO()
    console = show.PlainConsole(file=file, width=100, force_terminal=True)
    for row in layout(trained(), 100, Text("*")):
        console.print(row)
    assert bool(re.search(r"\x1b\[[0-9;]*[39][0-9]", file.getvalue())) == (variable != "NO_COLOR")


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("term", "moves"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_a_dumb_terminal_gets_lines(term: str, moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    console = show.PlainConsole(file=_Tty())
    assert show.is_terminal(console) == moves
    assert isinstance(live.view("training", out=console), Terminal) == moves
    assert not show.is_terminal(show.PlainConsole(file=io.StringIO(), force_terminal=True))  # a pipe, and FORCE_COLOR


def test_a_pipe_gets_a_line_for_each_logged_step(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(place / "model"), str(place / "data.jsonl"), "--out", str(tmp_path / "run"), "--samples", "0"]
    capsys.readouterr()
    assert main([*words, "--steps", "9", "--log-every", "3"]) == 0
    told = capsys.readouterr()
    steps = [line for line in told.out.splitlines() if line.startswith("step ") and " lr " in line]
    assert [line.split()[1] for line in steps] == ["1/9", "3/9", "6/9", "9/9"]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", told.out + told.err)


def test_a_signals_handler_writes_nothing_and_the_next_notice_tells() -> None:
    file = io.StringIO()
    console = show.PlainConsole(file=file, width=100)
    with Lines("training", console=console, out=console) as view:
        view.notice(tick(1))
        view.notice(Stopping())
        assert file.getvalue() == ""
        view.notice(tick(2))
        view.notice(tick(3))
    assert file.getvalue() == "stopping after this step\n"


def test_a_notebooks_view_takes_no_text_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    view = notebook.Notebook("training")
    monkeypatch.setattr(view, "_draw", lambda: None)
    view.hear(Warned(1, HOSTILE))
    view.notice(tick(3))
    view.notice(Phase(HOSTILE))
    page = view.html()
    assert "<script" not in page and "\x1b" not in page and page.count("&lt;script&gt;") == 2
    assert "3/1200" in page and '<progress value="3.000" max="1200"' in page
    assert "\x1b" not in view.text() and "loss 2.5000" in view.text()


KERNEL = """
import deltaw
records = [{"prompt": f"{n}?", "completion": f" {n}"} for n in range(24)]
config = deltaw.TrainConfig(out="run", steps=5, samples=0, batch=4)
result = deltaw.train("model", records, config)
result
"""


@pytest.mark.slow
def test_a_real_kernel_shows_one_output_that_is_replaced(place: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    (tmp_path / "model").symlink_to(place / "model")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(KERNEL)])
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for output in book.cells[0].outputs if "data" in output]
    view, result = outputs
    assert "5/5" in view["data"]["text/html"] and "<b>done</b>" in view["data"]["text/html"]
    assert "held-out loss" in result["data"]["text/html"] and "held-out loss" in result["data"]["text/plain"]


def test_what_is_counted_is_told_once() -> None:
    now = Now("merging")
    now.notice(Phase("merging", 125, 210))
    line = " ".join([now.head, *now.place(), *now.texts()])
    assert line.count("125/210") == 1 and now.bar is not None and now.bar.text == "125/210"
