"""JSON Lines and JSON arrays → rows, each with the line that it starts on."""

from __future__ import annotations

import json
import re

from deltaw.data.sources.row import Read, Row, keep, line_of, not_utf8
from deltaw.errors import first_line
from deltaw.files.formats.strict_json import DECODER, check_depth


def json_lines(raw: bytes, name: str) -> Read:
    """Read one object a line. Lines end at \\n alone: U+2028 and its like are ordinary characters inside JSON strings."""
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            value = DECODER.decode(line.decode("utf-8"))
            check_depth(value)
        except UnicodeDecodeError as error:
            problems.append(f"{place}: {not_utf8(error)}")
        except (ValueError, RecursionError) as error:
            problems.append(f"{place}: {_not_json(error)}")
        else:
            keep(place, value, rows, problems)
    return Read(rows, problems)


def json_array(raw: bytes, name: str) -> Read:
    """Read an array of objects one by one, so that each keeps the line it starts on."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Read([], [f"{name}:{line_of(raw, error.start)}: {not_utf8(error)}"])
    space = re.compile(r"[ \t\r\n]*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]  # the pattern matches anywhere

    rows: list[Row] = []
    problems: list[str] = []
    at, line, counted = skip(skip(0) + 1), 1, 0
    if text[at : at + 1] == "]":
        return Read([], [])
    while True:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = DECODER.raw_decode(text, at)
            check_depth(value)
        except json.JSONDecodeError as error:
            return Read(rows, [*problems, f"{name}:{error.lineno}: {_not_json(error)}"])
        except (ValueError, RecursionError) as error:
            return Read(rows, [*problems, f"{name}:{line}: {_not_json(error)}"])
        keep(f"{name}:{line}", value, rows, problems)
        at = skip(at)
        mark, after = text[at : at + 1], skip(at + 1)
        if mark == "]" and after == len(text):
            return Read(rows, problems)
        if mark != ",":
            end = f"{name}:{line_of(text, at)}"
            what = "the file ends inside the array" if not mark else f"expected ',' or the final ']', found {mark!r}"
            return Read(rows, [*problems, f"{end}: not JSON: {what}. Is the file cut off?"])
        at = after


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        short = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        cut = " The line is cut off or spread over lines" if short else ""
        hint = f"{cut}; a record is one whole object." if cut else ""
        return f"not JSON: {error.msg} at column {error.colno}.{hint}"
    return f"not JSON that can be read: {first_line(error)}"
