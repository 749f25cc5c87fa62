"""One strict reader of JSON from outside: no key twice, bounded nesting and size. Every failure is a ValueError."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from deltaw.errors import FileError, first_line

# Far above what adapters, models and runs have: a deeper value ends in errors of recursion where it is used
_DEEPEST = 100
# Bytes of a file
_LARGEST = 100_000_000


def parse(text: str | bytes) -> object:
    """Return the value of a JSON text.

    Raises ValueError for a text that is no JSON, a key that is twice in one object (of which `json` keeps the last), nesting
    beyond 100 levels, and half a character.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value: object = DECODER.decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check_depth(value)
    if "\\ud" in text.lower() and not _is_text(json.dumps(value, ensure_ascii=False)):
        raise ValueError("it has half a character (an unpaired surrogate)")
    return value


def parse_object(text: str | bytes) -> dict[str, object]:
    """Return the object that a JSON text holds. Raises ValueError as `parse` does, and for another value."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError("it holds no settings: these must stand in braces, {…}")
    return value


def read_object(path: Path) -> dict[str, object]:
    """Return the object in a JSON file. Raises FileError, which names the file."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than the {_LARGEST:,} that are read")
        return parse_object(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as JSON: {first_line(error)}") from error


def parse_texts(text: str) -> list[str]:
    """Return the list of texts that a JSON text holds. Raises ValueError."""
    value = parse(text)
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError("it is no list of texts")
    return value


def is_natural(value: object) -> bool:
    """Return whether a value is a whole number from 0 to what 63 bits hold; true and false are none."""
    return type(value) is int and 0 <= value < 2**63


_TOO_DEEP = f"it is nested deeper than {_DEEPEST} levels"


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:100]!r} is in it twice")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)
"""Decodes JSON, and raises ValueError for a key that is twice in one object."""


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_depth(value: object) -> None:
    """Raise ValueError for a value that is nested too deep, level by level."""
    level: list[object] = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _inside(outer: dict[str, object] | list[object]) -> Iterable[object]:
    return outer.values() if isinstance(outer, dict) else outer
