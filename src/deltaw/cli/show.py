"""The terminal: consoles, tables, and which messages of libraries pass. Knows no models.

All text for people goes through here, or through `errors.visible`. What stands in a record, a name or a message is shown as it
is: no markup in it counts, and no control character of it reaches the terminal.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.logging import RichHandler
from rich.segment import Segment
from rich.status import Status
from rich.table import Column, Table
from rich.text import Text

from deltaw.errors import visible
from deltaw.layers.names import by_family, in_order

_INTERVAL = re.compile(r"\s+(?=\[)")
_NAME_ROOM = 24  # characters of the names that a table keeps beside all amounts
_GAP = 2  # spaces between the columns of a table

# A file or a pipe has no edge, so no name needs to be broken over two lines
_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160


class PlainConsole(Console):
    """A console that shows any text as it is: markup counts only where a call asks for it (`markup=True`)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return a text, before its width is measured, with its control characters spelled out."""
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object. Texts inside it that did not come as strings are spelled out here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def status(self, status: RenderableType, **settings: Any) -> Status:
        """Return a line that is shown while it is open as a context, and replaced by its `update`."""
        return _PlainStatus(_plain(status), console=self, **settings)


class _PlainStatus(Status):
    """A line with a spinner; rich takes a string there for markup."""

    def update(self, status: RenderableType | None = None, **settings: Any) -> None:
        super().update(None if status is None else _plain(status), **settings)


def _plain(renderable: RenderableType) -> RenderableType:
    return Text(visible(renderable)) if isinstance(renderable, str) else renderable


out = PlainConsole(width=_width)
err = PlainConsole(stderr=True)


class _Once(logging.Filter):
    """Passes each warning once a command, whose steps may read the same folder again."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.passed
        if record.levelno >= logging.WARNING:
            self.passed.add(message)
        return new


def quiet_libraries() -> None:
    """Send deltaw's log to the console, and turn off progress bars and notices of the libraries below."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show_warning
    # torchao, which transformers imports if it is installed, warns of kernels that it cannot load, and torch of its classes
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Once it is imported, its environment variables come too late; we do not import it, as not every command needs it
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


def nothing() -> None:
    """Print nothing from now on but errors: another process of the run prints."""
    out.quiet = err.quiet = True


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a library's warning, which may quote a file or a record."""
    (file or sys.stderr).write(visible(warnings.formatwarning(message, category, filename, lineno, line)))


def as_json(values: object, *, indent: int | None = 1) -> str:
    """Return JSON in which a terminal has nothing to obey; it reads back as the same values."""
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    return _UNSAFE.sub(lambda character: f"\\u{ord(character.group()):04x}", text)


# json spells out those below 0x20 by itself
_UNSAFE = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def answer(text: str) -> None:
    """Print what a model wrote: exactly in a file or a pipe, with control characters spelled out in a terminal."""
    print(visible(text) if sys.stdout.isatty() else text)


def piece(text: str) -> None:
    """Print a part of what a model writes, at once: as `answer` does, without a newline."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def facts(rows: dict[str, str]) -> None:
    """Print a value beside each label. The terminal breaks long lines, so that a path is copied whole."""
    width = max(map(len, rows))
    for label, value in rows.items():
        out.print(Text.assemble((f"{visible(label):<{width}}  ", "dim"), visible(value)), soft_wrap=True)


def prose(text: str, *, style: str | None = None, console: Console | None = None) -> None:
    """Print sentences, folded between words in a terminal, as one line in a file or a pipe."""
    console = console or out
    console.print(text, style=style, soft_wrap=not console.is_terminal)


def system_of(adapter: str) -> None:
    """Print the system message that an adapter was trained with, which a program that serves it must be told."""
    from deltaw.training.opening import of_adapter

    if (system := of_adapter(adapter).system) is not None:
        prose(f"It was trained with the system message {system!r}: give it to the program that serves it.")


def notes(texts: Iterable[str]) -> None:
    """Print sentences on how records were read, on standard error."""
    for text in texts:
        prose(text, style="dim", console=err)


def is_terminal(console: Console) -> bool:
    """Return whether a person reads a console as it comes, in a terminal that can replace lines: TERM=dumb cannot."""
    return not console.quiet and console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


class _PlainTable(Table):
    """A table that keeps amounts whole in a narrow terminal.

    Headers are folded at spaces, values before their intervals, then names. Columns that still do not fit follow in further
    parts, each beside the names.
    """

    def add_column(self, header: RenderableType = "", *args: Any, **settings: Any) -> None:
        super().add_column(visible(str(header)), *args, **settings)

    def add_row(self, *cells: RenderableType | None, **settings: Any) -> None:
        super().add_row(*(visible(str(cell)) for cell in cells), **settings)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title is not None:  # rich would fold it to the width of the table
            yield Text(visible(str(self.title)), style="bold")
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
    """The width of the names, and the columns that fit beside them; all at once if the names keep _NAME_ROOM characters."""
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
    """The characters of each column: the widest become narrower until all fit, but no amount breaks."""
    widths, least = [_widest(column) for column in columns], [_widest(column, parts=True) for column in columns]
    while sum(widths) + _GAP * len(widths) > room and widths != least:
        reducible = [i for i, width in enumerate(widths) if width > least[i]]
        widths[max(reducible, key=widths.__getitem__)] -= 1
    return widths


def _cells(column: Column) -> list[str]:
    """The cells, with intervals on separate lines if the column is too narrow for both."""
    apart = column.width is not None and column.width < _widest(column)
    return [_INTERVAL.sub("\n", str(cell)) if apart else str(cell) for cell in column.cells]


def _widest(column: Column, *, parts: bool = False) -> int:
    """The characters of a column's widest cell, or of its longest unbreakable part.

    Parts are a word of the header, a value with its unit, and an interval.
    """
    header, cells = str(column.header), [str(cell) for cell in column.cells]
    if not parts:
        return max(map(cell_len, [header, *cells]))
    pieces = [piece for cell in cells for piece in _INTERVAL.split(cell)]
    return max((cell_len(piece) for piece in [*header.split(), *pieces]), default=0)


def table(*columns: str, title: str | None = None) -> Table:
    """Return a plain table: names in the first column, right-aligned amounts that never break in the others."""
    plain = _PlainTable(title=title)
    for i, name in enumerate(columns):
        plain.add_column(name, justify="right" if i else "left")
    return plain


def errors_of_layers(ranks: Mapping[str, int], errors: Mapping[str, float], what: str, *, every: bool) -> Table:
    """Return a table of layers' errors: a line for each, or (not `every`) for layers that differ only in their number."""
    errors_table = table("layers", "count", "rank", "error", "largest error", title=what)
    for name, layers in ({layer: [layer] for layer in in_order(ranks)} if every else by_family(ranks)).items():
        of_ranks, of_errors = sorted({ranks[layer] for layer in layers}), [errors[layer] for layer in layers]
        shown = str(of_ranks[0]) if len(of_ranks) == 1 else f"{of_ranks[0]} to {of_ranks[-1]}"
        mean = sum(of_errors) / len(of_errors)
        errors_table.add_row(name, str(len(layers)), shown, f"{mean:.3f}", f"{max(of_errors):.3f}")
    return errors_table
