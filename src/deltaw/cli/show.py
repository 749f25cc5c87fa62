"""How things look in the terminal: consoles, tables, what libraries may say. Knows no models."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from deltaw.names import by_family, in_order

T = TypeVar("T")

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


def fitting(columns: Sequence[T], name: Callable[[T], str], taken: int) -> Iterator[Sequence[T]]:
    """The columns of one table in groups that fit beside its first one, which takes so many characters; amounts take nine."""
    group: list[T] = []
    room = out.width - taken
    for column in columns:
        wanted = max(9, len(name(column))) + 2
        if group and wanted > room:
            yield group
            group, room = [], out.width - taken
        group.append(column)
        room -= wanted
    if group:
        yield group


def is_terminal() -> bool:
    return sys.stdout.isatty() and out.is_terminal


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table: every column but the first, which has names, is right-aligned, and where it is narrow gives way first."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        if i == 0:
            made.add_column(name, header_style="dim", no_wrap=True, overflow="fold")
        else:
            made.add_column(name, justify="right", header_style="dim", overflow="fold")
    return made


def errors_of_layers(ranks: Mapping[str, int], errors: Mapping[str, float], what: str, *, every: bool) -> Table:
    """How far each layer's ΔW is from the one wanted; unless `every`, a line for layers that differ in their number alone."""
    made = table("layers", "count", "rank", "error", "largest error", title=what)
    for name, layers in ({layer: [layer] for layer in in_order(ranks)} if every else by_family(ranks)).items():
        own, found = sorted({ranks[layer] for layer in layers}), [errors[layer] for layer in layers]
        shown = str(own[0]) if len(own) == 1 else f"{own[0]} to {own[-1]}"
        made.add_row(name, str(len(layers)), shown, f"{sum(found) / len(found):.3f}", f"{max(found):.3f}")
    return made
