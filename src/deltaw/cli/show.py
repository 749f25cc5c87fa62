"""How things look in the terminal: consoles, tables, what libraries may say. Knows no models."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.logging import RichHandler
from rich.table import Column, Table
from rich.text import Text

from deltaw.layers.names import by_family, in_order

_INTERVAL = re.compile(r"\s+(?=\[)")
_NAME_ROOM = 24  # characters of its names that a table keeps beside all of its amounts
_GAP = 2  # spaces between the columns of a table

# Into a file or a pipe there is no edge to keep within, so no name is broken over two lines
_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160

# No markup: a path, a target or a model's words may hold square brackets
out = Console(highlight=False, markup=False, width=_width)
err = Console(stderr=True, highlight=False, markup=False)


class _Once(logging.Filter):
    """Passes each warning once a command: several steps of one read the same folder."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.said
        if record.levelno >= logging.WARNING:
            self.said.add(message)
        return new


def quiet_libraries() -> None:
    """Ours speaks through the console; the libraries below us keep their progress bars and chatter to themselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # torchao, which transformers imports where it finds it, tells of kernels that it cannot load, and torch of its classes
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Where it is imported its environment comes too late; here it is not, since not every command needs it
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    ours = logging.getLogger("deltaw")
    handler = RichHandler(console=err, show_time=False, show_path=False, markup=False)
    handler.addFilter(_Once())
    ours.handlers = [handler]
    ours.setLevel(logging.INFO)
    ours.propagate = False
    logging.getLogger("deltaw.coverage").setLevel(logging.WARNING)  # commands print it


def facts(rows: dict[str, str]) -> None:
    """Print a value beside each label. Where a line is too long the terminal breaks it, so a path is copied whole."""
    width = max(map(len, rows))
    for label, value in rows.items():
        out.print(Text.assemble((f"{label:<{width}}  ", "dim"), value), soft_wrap=True)


def prose(text: str, *, style: str | None = None, console: Console | None = None) -> None:
    """Print sentences: folded between words in a terminal, one line each in a file or a pipe."""
    console = console or out
    console.print(text, style=style, soft_wrap=not console.is_terminal)


def is_terminal() -> bool:
    return sys.stdout.isatty() and out.is_terminal


class _PlainTable(Table):
    """A table that keeps amounts whole where it is narrow: headers are folded at spaces, values before intervals, then names.
    Where that is not enough, columns follow in further parts, each beside the names."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title is not None:  # rich would fold it to the width of the table
            yield Text(str(self.title), style="bold")
        names, *amounts = self.columns
        most = options.max_width - _GAP  # rich counts one after the last column too
        for name_width, group in _parts(names, amounts, most):
            part = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
            for column, width in zip([names, *group], [name_width, *_widths(group, most - name_width)], strict=True):
                column.width = width
                part.add_column(column.header, width=width, justify=column.justify, header_style="dim", overflow="fold")
            shown = [names.cells, *map(_cells, group)]
            for row, *cells in zip(self.rows, *shown, strict=True):
                part.add_row(*cells, style=row.style)
            yield part


def _parts(names: Column, amounts: Sequence[Column], most: int) -> Iterator[tuple[int, list[Column]]]:
    """Columns that fit beside the names, and how wide these are. All at once where the names keep _NAME_ROOM characters."""
    least = [_widest(column, parts=True) + _GAP for column in amounts]
    name_width, room = _widest(names), most - sum(least)
    if room >= min(name_width, _NAME_ROOM):
        yield min(name_width, room), list(amounts)
        return
    name_width = max(min(name_width, max(most // 2, _NAME_ROOM), most - max(least)), 1)
    group: list[Column] = []
    taken = 0
    for column, width in zip(amounts, least, strict=True):
        if group and taken + width > most - name_width:
            yield name_width, group
            group, taken = [], 0
        group.append(column)
        taken += width
    yield name_width, group


def _widths(columns: Sequence[Column], room: int) -> list[int]:
    """Characters of each column, the widest ones made narrower until they fit, but no amount breaks."""
    widths, least = [_widest(column) for column in columns], [_widest(column, parts=True) for column in columns]
    while sum(widths) + _GAP * len(widths) > room and widths != least:
        reducible = [i for i, width in enumerate(widths) if width > least[i]]
        widths[max(reducible, key=widths.__getitem__)] -= 1
    return widths


def _cells(column: Column) -> list[str]:
    """Cells with their intervals on lines of their own, where the column is too narrow for both."""
    apart = column.width is not None and column.width < _widest(column)
    return [_INTERVAL.sub("\n", str(cell)) if apart else str(cell) for cell in column.cells]


def _widest(column: Column, *, parts: bool = False) -> int:
    """Characters of a column's widest cell, or of its longest part that is not folded: a word of the header, a value with its
    unit, an interval."""
    header, cells = str(column.header), [str(cell) for cell in column.cells]
    if not parts:
        return max(map(cell_len, [header, *cells]))
    pieces = [piece for cell in cells for piece in _INTERVAL.split(cell)]
    return max((cell_len(piece) for piece in [*header.split(), *pieces]), default=0)


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table: the first column has names; all others have amounts, right-aligned and never broken within a number."""
    made = _PlainTable(title=title)
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if i else "left")
    return made


def errors_of_layers(ranks: Mapping[str, int], errors: Mapping[str, float], what: str, *, every: bool) -> Table:
    """How far each layer's ΔW is from the one wanted; unless `every`, a line for layers that differ in their number alone."""
    made = table("layers", "count", "rank", "error", "largest error", title=what)
    for name, layers in ({layer: [layer] for layer in in_order(ranks)} if every else by_family(ranks)).items():
        own, found = sorted({ranks[layer] for layer in layers}), [errors[layer] for layer in layers]
        shown = str(own[0]) if len(own) == 1 else f"{own[0]} to {own[-1]}"
        made.add_row(name, str(len(layers)), shown, f"{sum(found) / len(found):.3f}", f"{max(found):.3f}")
    return made
