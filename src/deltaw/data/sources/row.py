"""A row of a source, and what a reader returns. Problems are finished lines of text.

Only blank lines are skipped. A reader continues after a bad line, so that one run shows every one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Fields = Mapping[str, object]
"""A row's values by their fields."""
Row = tuple[str, Fields]
"""A row's place, for messages, and its fields."""


@dataclass(frozen=True)
class Read:
    """The rows of a file or of a split."""

    rows: list[Row]
    problems: list[str]
    """A line for each row that cannot be read, beginning with its place."""
    notes: tuple[str, ...] = ()
    """Sentences on how the file was read, where that is no matter of course."""
    name: str = ""
    """The source, for messages."""


def keep(place: str, value: object, rows: list[Row], problems: list[str]) -> None:
    """Add a value to the rows if it is an object with fields, else say so among the problems."""
    if isinstance(value, dict):
        rows.append((place, value))
    else:
        turns = (
            isinstance(value, list)
            and value
            and isinstance(value[0], dict)
            and ("role" in value[0] or "from" in value[0])
        )
        hint = '. Messages stand in a field: {"messages": […]}' if turns else ""
        problems.append(f"{place}: a record must be an object with named fields, found {show(value)}{hint}")


def bare(value: object) -> object:
    """Return a value of a table without the nulls of its objects.

    All objects of a column have the same fields there, and null where a record had none.
    """
    if isinstance(value, dict):
        return {name: bare(part) for name, part in value.items() if part is not None}
    return [bare(part) for part in value] if isinstance(value, list) else value


def line_of(text: str | bytes, at: int) -> int:
    """Return the 1-based line of an offset."""
    lines = text.count("\n", 0, at) if isinstance(text, str) else text.count(b"\n", 0, at)
    return lines + 1


def show(value: object) -> str:
    """Return a value for a message: its type and its first characters."""
    if value is None:
        return "null"
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, lists within lists
        return type(value).__name__
    short = (
        repr(text[:40] + "…" if len(text) > 40 else text)
        if isinstance(value, str)
        else text[:40] + "…" * (len(text) > 40)
    )
    return f"{type(value).__name__} {short}"


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return what is wrong with bytes that are no UTF-8, and what to do."""
    byte, column = error.object[error.start], error.start - error.object.rfind(b"\n", 0, error.start)
    if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "the file is UTF-16. Save it as UTF-8, or read it with --encoding utf-16."
    return (
        f"not UTF-8: byte 0x{byte:02x} at byte {column} of the line. Save the file as UTF-8, or name its encoding: "
        "--encoding cp1252 for files of Windows programs."
    )
