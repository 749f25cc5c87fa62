"""JSON Lines, JSON arrays and objects of several lines → rows, each with the line that it starts on."""

from __future__ import annotations

import json
import re

from deltaw.data.sources.row import Read, Row, keep, line_of, not_utf8
from deltaw.errors import first_line
from deltaw.files.formats.strict_json import DECODER, check_depth

_SPACE = re.compile(r"[ \t\r\n]*")


def json_text(raw: bytes, name: str) -> Read:
    """Read an array, objects of several lines one after another (as jq writes them), or one object a line."""
    text = raw.strip()
    first, more, _ = text.partition(b"\n")
    alone = _is_json(first)
    if text[:1] == b"[" and not (alone and more):  # lines of lists are told line by line
        return json_array(raw, name)
    spread = None if alone or text[:1] != b"{" else _objects(raw, name)
    return spread or json_lines(raw, name)


def _is_json(line: bytes) -> bool:
    try:
        DECODER.decode(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _objects(raw: bytes, name: str) -> Read | None:
    """Read objects one after another; None where the first is on one line, and what is wrong with it is told by lines."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    rows: list[Row] = []
    problems: list[str] = []
    at, line, counted = _skip(text, 0), 1, 0
    is_spread = text[at : at + 2].rstrip() == "{"
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = DECODER.raw_decode(text, at)
            check_depth(value)
        except json.JSONDecodeError as error:
            problems.append(f"{name}:{error.lineno}: {_not_json(error)}")
            break
        except (ValueError, RecursionError) as error:
            problems.append(f"{name}:{line}: {_not_json(error)}")
            break
        is_spread = is_spread or "\n" in text[counted:at]
        if not is_spread:
            return None
        keep(f"{name}:{line}", value, rows, problems)
        at = _skip(text, at)
    return Read(rows, problems) if is_spread else None


def _skip(text: str, at: int) -> int:
    """Return where white space ends."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # the pattern matches anywhere


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
    rows: list[Row] = []
    problems: list[str] = []
    at, line, counted = _skip(text, _skip(text, 0) + 1), 1, 0
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
        at = _skip(text, at)
        mark, after = text[at : at + 1], _skip(text, at + 1)
        if mark == "]" and after == len(text):
            return Read(rows, problems)
        if mark != ",":
            end = f"{name}:{line_of(text, at)}"
            what = "the file ends inside the array" if not mark else f"expected ',' or the final ']', found {mark!r}"
            return Read(rows, [*problems, f"{end}: not JSON: {what}. Is the file cut off?"])
        at = after


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}.{_hint(error)}"
    return f"not JSON that can be read: {first_line(error)}"


def _hint(error: json.JSONDecodeError) -> str:
    """Return what to do about text that is no JSON, where that is plain."""
    rest, whole = error.doc[error.pos :].lstrip(), error.doc.lstrip()
    if rest[:1] == ",":
        return " Remove the comma after the record."
    if rest[:1] in ("]", "}") and error.doc[: error.pos].rstrip().endswith(","):
        return f" Remove the comma before the {rest[0]}."
    if error.msg.startswith("Extra data") and rest[:1] == "{":
        return " Put each record on a line of its own."
    if rest[:1] == "'" or rest.startswith(("None", "True", "False")):
        return " Python writes so; write records with json.dumps."
    if whole[:1] not in ("{", "["):
        return " Is it a CSV file? Then name it .csv." if "," in whole and whole[:1] not in ("/", "#") else ""
    if not rest or error.msg.startswith("Unterminated"):
        return " The line is cut off or spread over lines; a record is one whole object."
    return ""
