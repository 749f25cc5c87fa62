"""The live view of a long call: in a notebook, in a terminal, or in plain lines elsewhere.

Commands open one by `view`; so do the public functions, through the table in `deltaw.__init__`.
"""

from __future__ import annotations

from rich.console import Console

from deltaw.cli import notebook, show
from deltaw.cli.lines import TRAINING, Lines
from deltaw.cli.terminal import Terminal


def view(subject: str, *, out: Console | None = None, quiet: bool = False) -> Lines:
    """Return the view of a call.

    Args:
        subject: the call in a word. Of "training" each logged step is a line; other calls have one now and then.
        out: the console of lines that stay; by default standard error, with all else.
        quiet: show only what moves.
    """
    if out is None and notebook.is_here():
        return notebook.Notebook(subject)
    console = out if out is not None and subject == TRAINING else show.err
    kind = Terminal if show.is_terminal(console) else Lines
    return kind(subject, console=console, out=show.err if out is None else out, quiet=quiet)
