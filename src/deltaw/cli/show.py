"""How things look in the terminal: numbers, tables, notices. Knows no models."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def quiet_libraries() -> None:
    """Ours speaks through the console; the libraries below us keep their progress bars and chatter to themselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    ours = logging.getLogger("deltaw")
    ours.handlers = [RichHandler(console=err, show_time=False, show_path=False, markup=False)]
    ours.setLevel(logging.INFO)
    ours.propagate = False


def is_terminal() -> bool:
    return sys.stdout.isatty() and out.is_terminal


def size(count: float) -> str:
    """Bytes as people read them: 4.9 MB (powers of ten, as disks are sold and papers count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 07 s or 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; every column but the first is right-aligned."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i == 0 else "right", header_style="dim")
    return made
