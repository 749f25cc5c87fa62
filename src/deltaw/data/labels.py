"""What the labels of records are: classes by name, or quantities. Knows records; nothing of models.

A class's name is its label as text, so 1 in a JSON file and "1" in a CSV file are the same class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deltaw.data.forms import Record
from deltaw.errors import DataError, listing, nearest

_MOST_CLASSES = 1000


def are_quantities(records: Sequence[Record]) -> bool:
    """Whether the labels are numbers to predict rather than classes: numbers all, and not whole ones all."""
    values = [number(r.label) for r in records if r.label is not None]
    return bool(values) and all(v is not None for v in values) and any(v != int(v) for v in values if v is not None)


def number(label: Any) -> float | None:
    """A label as a finite number (also of a CSV cell's text), or None."""
    try:
        value = float(label)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def class_name(label: Any) -> str:
    """A label as the name of a class: 1, 1.0 and "1" are "1"."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(int(label)) if isinstance(label, bool) else str(label).strip()


def class_names(records: Sequence[Record], source: str = "") -> list[str]:
    """The classes that there are: numbers by their size, names by the alphabet. Raises DataError, with the records' `source`,
    where these cannot be classes."""
    found = sorted({class_name(r.label) for r in records if r.label is not None})
    if all(number(name) is not None for name in found):
        found.sort(key=float)
    if "-1" in found and len(found) > 2:
        places = [r.place for r in records if class_name(r.label) == "-1"]
        raise DataError(
            f"{len(places)} records have the label -1 ({places[0]}, say), with which data sets mark labels that they keep "
            "secret. Leave these records out, or name all classes with labels."
        )
    if len(found) < 2:
        said = f"All labels of {source}" if source else "All labels"
        raise DataError(f"{said} are {found[0] if found else 'missing'!r}: there is nothing to tell apart.")
    if len(found) > _MOST_CLASSES:
        raise DataError(
            f"The labels are {len(found):,} different ones, {found[0]!r} and {found[1]!r} among them: more than classes could "
            "be. Set task: regression if they are quantities."
        )
    return found


def class_indices(records: Sequence[Record], names: Sequence[str], source: str) -> list[int]:
    """The number of each record's class among `names`. Raises one DataError with every record of another class."""
    known = {name: i for i, name in enumerate(names)}
    problems = [
        f"{r.place}: there is no class {class_name(r.label)!r}{nearest(class_name(r.label), known)}"
        for r in records
        if class_name(r.label) not in known
    ]
    if problems:
        few = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
        raise DataError(listing(f"{source}: {len(problems)} records are of classes other than {few}:", problems))
    return [known[class_name(r.label)] for r in records]


def quantities(records: Sequence[Record], source: str) -> list[float]:
    """Each record's label as a number. Raises one DataError with every record whose label is none."""
    values = [number(r.label) for r in records]
    problems = [f"{r.place}: {r.label!r} is no number" for r, v in zip(records, values, strict=True) if v is None]
    if problems:
        raise DataError(listing(f"{source}: {len(problems)} labels are no numbers:", problems))
    return [v for v in values if v is not None]
