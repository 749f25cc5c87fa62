"""The live view of a call at the bottom of a terminal: words, a bar and figures, as wide as the terminal is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from deltaw.cli.lines import TRAINING, Lines
from deltaw.cli.now import Bar, Now
from deltaw.training.events import Stepped

DRAWINGS = 10
"""Drawings a second, however fast steps are."""
_LEAST_BAR = 8
_GAP = 2


class Terminal(Lines):
    """Shows a call in a few lines at the bottom of a terminal, which move; lines that stay scroll above them.

    Notices are only taken up; a thread of rich's draws, at most `DRAWINGS` times a second.
    """

    def __init__(self, subject: str, *, console: Console, out: Console, quiet: bool = False) -> None:
        super().__init__(subject, console=console, out=out, quiet=quiet)
        # What goes to a file does not pass through the terminal
        self._live = Live(
            self, console=console, refresh_per_second=DRAWINGS, redirect_stdout=sys.stdout.isatty(), transient=True
        )
        self._spinner = Spinner("dots" if console.encoding.startswith("utf") else "line")

    def __enter__(self) -> Terminal:
        super().__enter__()
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        self.now.ended = "trained" if kind is None else "stopped"
        # The bar of a training stays; what there was to see of other calls is in their results
        self._live.transient = self.now.subject != TRAINING or self.now.tick is None
        self._live.stop()

    def step(self, event: Stepped) -> None:
        """Show nothing: each step moves the view."""

    def draw(self) -> None:
        """Leave it to the thread."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spinner = Text("") if self.now.ended else self._spinner.render(console.get_time())
        yield from layout(self.now, options.max_width, spinner)


def layout(now: Now, width: int, spinner: RenderableType = "") -> Iterator[RenderableType]:
    """Yield the lines of a view, at most `width` characters wide: its words, a bar and where it is, then figures."""
    head, bar, place = now.head, now.bar, now.place()
    rest = now.texts()
    beside = 1 + 2 * _GAP  # the spinner, and gaps
    words = min(cell_len(head), max(width // 2, width - beside - _LEAST_BAR - _length(place[:1])))
    room = width - beside - words
    if _length([*place, *rest]) + 3 * _LEAST_BAR <= room:
        place, rest = [*place, *rest], []
    while len(place) > 1 and _length(place) + _LEAST_BAR > room:
        rest.insert(0, place.pop())
    yield _row(Text(head, style="bold"), words, bar, place, width, spinner)
    for row in _folded(rest, width - _GAP):
        yield Text(" " * _GAP + (" " * _GAP).join(row), no_wrap=True, overflow="ellipsis")


def _row(head: Text, words: int, bar: Bar | None, place: list[str], width: int, spinner: RenderableType) -> Table:
    """Return the first line, of which `words` characters are for the head."""
    row = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    row.width = width
    cells: list[RenderableType] = [spinner, head]
    row.add_column(no_wrap=True)
    row.add_column(no_wrap=True, overflow="ellipsis", width=words)
    if bar is not None:
        row.add_column(ratio=1, min_width=1)
        cells.append(ProgressBar(total=bar.total, completed=bar.part))
    for text in place:
        row.add_column(no_wrap=True, overflow="ellipsis")
        cells.append(Text(text))
    if bar is None:  # what is there stays at the left
        row.add_column(ratio=1)
        cells.append(Text(""))
    row.add_row(*cells)
    return row


def _length(texts: list[str]) -> int:
    return sum(cell_len(text) + _GAP for text in texts)


def _folded(texts: list[str], width: int) -> Iterator[list[str]]:
    """Yield the texts in rows of at most `width` characters; one that is wider has a row of its own."""
    row: list[str] = []
    for text in texts:
        if row and _length([*row, text]) - _GAP > width:
            yield row
            row = []
        row.append(text)
    if row:
        yield row
