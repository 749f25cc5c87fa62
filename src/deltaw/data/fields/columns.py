"""Columns that the user names: `prompt=question,completion=choices.0.text`.

A path goes into objects by names, into lists by numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deltaw.data.sources import Fields, Row
from deltaw.errors import ConfigError, nearest, shown

TARGETS = (
    "prompt", "completion", "instruction", "input", "output", "text", "text_pair", "label", "image", "messages", "system",
    "history", "tools",
)  # fmt: skip
"""Names of fields that a column can be taken as."""
_ALSO = {
    "question": "prompt", "query": "prompt", "source": "prompt", "answer": "completion", "response": "completion",
    "target": "completion", "conversations": "messages", "conversation": "messages", "class": "label", "category": "label",
    "sentence": "text", "sentence1": "text", "sentence2": "text_pair", "premise": "text", "hypothesis": "text_pair",
}  # fmt: skip
"""Names that fields often have → the target that they are meant as."""
IGNORE = "ignore"
"""The target of columns that are left out on purpose."""
_ANSWERS = ("completion", "output", "label")
_NOTHING = object()


@dataclass(frozen=True)
class Columns:
    """Columns by what they are taken as."""

    taken: Mapping[str, str]
    """One of TARGETS → the path of its values."""
    ignored: frozenset[str]
    """Fields that are left out on purpose."""


def columns_of(text: str, rows: Sequence[Row], source: str, *, answers: bool = True) -> Columns:
    """Return the columns that a setting names, for the rows of a source. Without `answers`, those of answers may be missing.

    Raises one ConfigError with everything wrong in it: names that no form has, a name with two columns, paths in no record.
    """
    taken: dict[str, str] = {}
    ignored: set[str] = set()
    problems: list[str] = []
    for piece in _pieces(text):
        name, equals, path = (part.strip() for part in piece.partition("="))
        if not (name and equals and path):
            problems.append(f"{piece.strip()!r} is no NAME=COLUMN")
        elif name == IGNORE:
            ignored.add(path)
            near = nearest(path, _paths(rows), cutoff=0.7)
            if near and not any(has(fields, path) for _, fields in rows):
                problems.append(f"{source}: no record has {path!r} to leave out{near}")
        elif name not in TARGETS and path in TARGETS:
            problems.append(f"{piece.strip()!r} is the wrong way round: {path}={name}")
        elif name not in TARGETS:
            here = _ALSO.get(name.lower())
            hint = f": it is {here} here" if here else nearest(name, (*TARGETS, IGNORE))
            problems.append(f"there is no {name!r} to take {path!r} as{hint}")
        elif name in taken:
            problems.append(f"{name} has two columns, {taken[name]!r} and {path!r}")
        else:
            taken[name] = path
            if (answers or name not in _ANSWERS) and not any(has(fields, path) for _, fields in rows):
                near = nearest(path, _paths(rows)) or f"; they have {shown(_fields(rows), 10)}"
                problems.append(f"{source}: no record has {path!r}{near}")
    if problems:
        advice = f"Write it as prompt=question,completion=answer. Names: {', '.join(TARGETS)}, and {IGNORE} to leave a field out."
        raise ConfigError(f"columns is {text!r}, which cannot be used:", problems, advice)
    return Columns(taken, frozenset(ignored))


def picture_of(text: str) -> str:
    """Return the field that holds pictures, with these columns."""
    paths = [
        path.strip() for name, _, path in (piece.partition("=") for piece in _pieces(text)) if name.strip() == "image"
    ]
    return paths[0] if paths else "image"


def has(fields: Fields, path: str) -> bool:
    """Return whether a record has a value at a path."""
    return _at(fields, path) is not _NOTHING


def value_at(fields: Fields, path: str) -> object:
    """Return the value at a path; None without one."""
    value = _at(fields, path)
    return None if value is _NOTHING else value


def head_of(fields: Fields, path: str) -> str:
    """Return the field that a path begins with."""
    return path if path in fields else path.partition(".")[0]


def _pieces(text: str) -> list[str]:
    """Return the assignments in a setting. A comma that no assignment follows is part of a column's name."""
    pieces: list[str] = []
    for piece in text.split(","):
        if "=" in piece or not pieces:
            pieces.append(piece)
        else:
            pieces[-1] += f",{piece}"
    return [piece for piece in pieces if piece.strip()]


def _at(value: object, path: str) -> object:
    if isinstance(value, Mapping) and path in value:
        return value[path]
    for piece in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(piece, _NOTHING)
        elif (
            isinstance(value, (list, tuple))
            and piece.removeprefix("-").isdecimal()
            and -len(value) <= int(piece) < len(value)
        ):
            value = value[int(piece)]
        else:
            return _NOTHING
    return value


def _fields(rows: Sequence[Row]) -> list[str]:
    """Return the fields of the first records."""
    return list(dict.fromkeys(str(name) for _, fields in rows[:20] for name in fields))


def _paths(rows: Sequence[Row]) -> list[str]:
    """Return the paths in the first records, for suggestions: fields, and what is in objects and lists in them."""
    return list(dict.fromkeys(path for _, fields in rows[:20] for path in _within(fields, 3)))


def _within(value: object, depth: int) -> Iterable[str]:
    if isinstance(value, Mapping):
        inside = [(str(name), part) for name, part in value.items()]
    else:
        inside = [(str(i), part) for i, part in enumerate(value)] if isinstance(value, (list, tuple)) else []
    for name, part in inside[:100]:
        yield name
        if depth > 1:
            yield from (f"{name}.{rest}" for rest in _within(part, depth - 1))
