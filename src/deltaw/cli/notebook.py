"""The live view of a long call in a notebook: one output of the cell, which is replaced as the call goes on."""

from __future__ import annotations

import html
import sys
import time
from typing import Any

from deltaw.cli import show
from deltaw.cli.lines import Line, Lines
from deltaw.errors import visible
from deltaw.progress import Phase
from deltaw.training.events import Stepped

# Seconds between two drawings; words that change are drawn at once
_EVERY = 0.2
# Lines under the bar
_LINES = 12


def is_here() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class Notebook(Lines):
    """Shows a call as HTML below its cell."""

    def __init__(self, subject: str) -> None:
        super().__init__(subject, console=show.err, out=show.err)
        self._kept: list[Line] = []
        self._handle: Any = None
        self._drawn = 0.0
        self._words = ""

    def __exit__(self, kind: type[BaseException] | None = None, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        self.now.ended = "done" if kind is None else "stopped"
        self._draw()

    def line(self, line: Line) -> None:
        """Keep a line, and show it below the bar."""
        self._kept = [*self._kept[1 - _LINES :], line]
        self._draw()

    def step(self, event: Stepped) -> None:
        """Show nothing: each step moves the view."""

    def draw(self) -> None:
        """Replace what is shown, if its words are others or the last time was a while ago."""
        phase = self.now.phase
        words = phase.text if isinstance(phase, Phase) else self.now.head
        if words != self._words or time.monotonic() - self._drawn >= _EVERY:
            self._words = words
            self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        self._drawn = time.monotonic()
        bundle = {"text/html": self.html(), "text/plain": self.text()}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def texts(self) -> list[str]:
        """Return what is shown beside and below the bar."""
        return [*self.now.place(), *self.now.texts()]

    def text(self) -> str:
        """Return the same in characters, for front ends without HTML."""
        return "\n".join(
            [visible("  ".join([self.now.head, *self.texts()])), *(visible(line.text) for line in self._kept)]
        )

    def html(self) -> str:
        """Return the view as HTML. Nothing of a record or a name counts as markup."""
        bar = self.now.bar
        drawn = f'<progress value="{bar.part:.3f}" max="{bar.total:g}" style="width:16em"></progress> ' if bar else ""
        figures = " · ".join(_safe(text) for text in self.texts())
        kept = "".join(f"<div{_STYLES.get(line.style or '', '')}>{_safe(line.text)}</div>" for line in self._kept)
        return f"<div><b>{_safe(self.now.head)}</b> {drawn}{figures}</div>{kept}"


_STYLES = {"yellow": ' style="color:#b36b00"', "dim": ' style="opacity:.7"', "bold": ' style="font-weight:bold"'}


def _safe(text: str) -> str:
    return html.escape(visible(text))
