"""A result in a few lines: as text for a prompt, as a small table for a notebook. Knows no results."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Mapping

from deltaw.errors import visible

_MOST = 110
"""Characters of a value; the middle of a longer one is left out."""


class Card(ABC):
    """Base of results that show themselves in a few lines."""

    @abstractmethod
    def card(self) -> tuple[str, dict[str, str]]:
        """Return the title, and label → value of what is worth knowing first."""

    def __repr__(self) -> str:
        title, rows = self.card()
        return as_text(title, rows)

    def _repr_html_(self) -> str:
        title, rows = self.card()
        return as_html(title, rows)


def as_text(title: str, rows: Mapping[str, str]) -> str:
    """Return a title and a line for each row, control characters spelled out.

    >>> print(as_text("Run", {"held-out loss": "0.5", "folder": "runs/a"}))
    Run
      held-out loss  0.5
      folder         runs/a
    """
    width = max(map(len, rows), default=0)
    return "\n".join([_line(title), *(f"  {_line(label):<{width}}  {_line(value)}" for label, value in rows.items())])


def as_html(title: str, rows: Mapping[str, str]) -> str:
    """Return a title and a table. Nothing in them counts as markup.

    >>> as_html("Run", {"model": "<b>"})
    '<div><b>Run</b><table><tr><th>model</th><td>&lt;b&gt;</td></tr></table></div>'
    """
    cells = "".join(f"<tr><th>{_safe(label)}</th><td>{_safe(value)}</td></tr>" for label, value in rows.items())
    return f"<div><b>{_safe(title)}</b><table>{cells}</table></div>"


def _safe(text: str) -> str:
    return html.escape(_line(text))


def _line(text: str) -> str:
    """Return a text on one line, not too long."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= _MOST else f"{line[: _MOST // 2]} … {line[-_MOST // 2 :]}"
