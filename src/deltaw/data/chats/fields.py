"""Values of fields: texts, JSON in texts, and what is wrong with them. Knows no form of record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from deltaw.data.sources import show
from deltaw.errors import first_line, nearest
from deltaw.files.formats import strict_json

Fields = Mapping[str, object]


def text_problem(value: object, name: str, *, empty: bool = False) -> str | None:
    """Return what is wrong with the text in a field; None where nothing is. empty: whether it may be."""
    if not isinstance(value, str):
        return f"field {name!r} must be text, found {show(value)}"
    if not empty and not value.strip():
        return f"field {name!r} is empty ({value!r}); fill it in or remove the record"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return (
            f"field {name!r} has half a character (unpaired surrogate \\u{ord(value[error.start]):04x} "
            f"at character {error.start + 1}); write the whole character"
        )
    return None


def parsed(text: str, where: str, lines: list[str]) -> object:
    """Return the value of a JSON text; None, with a line, where it is no JSON."""
    try:
        return strict_json.parse(text)
    except ValueError as error:
        python = ". Python writes so; write it with json.dumps" if re.match(r"[\[{\s]*'", text) else ""
        lines.append(f"{where} is text that is no JSON ({first_line(error)}): {show(text)}{python}")
        return None


def missing(fields: Fields, name: str, known: Sequence[str]) -> str:
    """Return the line for a field that is not there. known: names with a meaning, which are no misspelling of another."""
    there = [str(field) for field in fields]
    near = nearest(name, [field for field in there if field not in known])
    return f"field {name!r} is missing{near}; the record has {', '.join(there) or 'no fields'}"
