"""Labels of records: classes by name, or quantities. Knows records; nothing of models.

A class's name is its label as text, so 1 in a JSON file and "1" in a CSV file are the same class. Nothing here decides by a
single record: labels that would make another task than the others are refused, each by its file and line.
"""

from __future__ import annotations

import math
import numbers
import re
import unicodedata
from collections.abc import Sequence

from deltaw.data.forms import Label, Record
from deltaw.errors import DataError, nearest, shown

_MOST_CLASSES = 1000
_UNLABELLED = {"<na>", "nat", "null", "nil", "none", "na", "n/a", "n.a.", "(blank)", "(null)", "missing", "\\n"}
"""Texts by which programs say that there is no value, in lower case."""
_NO_VALUE = re.compile(r"[+-]?(nan|inf|infinity)\b.*|[+-]?1\.#(s?nan|qnan|inf|ind).*|#[a-z/_0]+[!?]?", re.IGNORECASE)
"""Numbers that cannot be used, and errors of a spreadsheet: nan(ind), -inf, 1.#QNAN, #DIV/0!."""
_NO_NAMES = {"nan", "NaN", "NAN", "<NA>", "NaT", "null", "NULL", "None"}
"""Texts that are no class either, unless the settings name them as one. (A class may well be called none.)"""
_WITH_COMMAS = re.compile(r"[+-]?\d+(,\d+)+(\.\d+)?")
_WHOLE = re.compile(r"[+-]?\d+\.0+")


def are_quantities(records: Sequence[Record], source: str = "") -> bool:
    """Return whether the labels are numbers to predict, not classes: all of them numbers, and some not whole.

    Raises one DataError with every record whose label does not fit the others: a nan among numbers, a word among decimals, a
    number with a comma.
    """
    decimals = any(v is not None and v != int(v) for v in map(_value, records))
    _check_alike(records, source, decimals=decimals)
    return decimals


def _value(record: Record) -> float | None:
    """Return a label as a number; true and false are none."""
    return None if isinstance(record.label, bool) else number(record.label)


def _check_alike(records: Sequence[Record], source: str, *, decimals: bool) -> None:
    """Raise one DataError with every record whose label stands for none, or has a comma where the others are numbers.

    With `decimals`, every label that is no number is in it too.
    """
    labelled = [r for r in records if r.label is not None]
    rest = [r for r in labelled if _value(r) is None]
    words = [r for r in rest if not (_WITH_COMMAS.fullmatch(_text(r)) or _is_empty(r))]
    among_numbers = len(rest) < len(labelled) and not words
    problems = []
    for record in rest:
        text = _text(record)
        if text in _NO_NAMES or (_is_empty(record) and among_numbers):
            problems.append(f"{record.place}: {record.label!r} stands for no label")
        elif _WITH_COMMAS.fullmatch(text) and not words:
            problems.append(
                f"{record.place}: {record.label!r} has a comma; write 1.5 for one and a half, 1000 for a thousand"
            )
        elif decimals:
            problems.append(f"{record.place}: {record.label!r} is no number, and others are decimals")
    if problems:
        raise DataError(
            f"{source}: {len(problems)} of {len(records)} labels do not fit the others:",
            problems,
            "Fill them in or leave these records out. If they are classes, name all classes with labels.",
        )


def _is_empty(record: Record) -> bool:
    """Return whether the label may stand for none: n/a, ?, a dash, nan, infinity, an error of a spreadsheet."""
    text = _text(record)
    if text.lower() in _UNLABELLED or _NO_VALUE.fullmatch(text) or _overflows(text):
        return True
    return not any(
        unicodedata.category(character)[0] in "LNM" or unicodedata.category(character) == "So" for character in text
    )


def _overflows(text: str) -> bool:
    """Return whether a text is a number too large for a float: 1e400."""
    try:
        return math.isinf(float(text))
    except ValueError:
        return False


def _text(record: Record) -> str:
    return str(record.label).strip()


def number(label: Label) -> float | None:
    """Return a label as a finite number (also of a CSV cell's text), or None."""
    if label is None or (isinstance(label, str) and "_" in label):
        return None  # Python would read 1_0 as 10: it is a name
    try:
        value = float(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def class_name(label: Label) -> str:
    """Return a label as the name of a class: 1, 1.0, "1", "1.0" and true are "1". "007" stays as it is."""
    if isinstance(label, numbers.Real) and float(label).is_integer():
        return str(int(float(label)))
    text = str(label).strip()
    return str(int(float(text))) if _WHOLE.fullmatch(text) and not _overflows(text) else text


def class_names(records: Sequence[Record], source: str = "") -> list[str]:
    """Return the records' classes: numbers by their size, names by the alphabet.

    Raises DataError, with the records' `source`, where these cannot be classes, or a label stands for none.
    """
    _check_alike(records, source, decimals=False)
    names = sorted({class_name(r.label) for r in records if r.label is not None})
    if all(number(name) is not None for name in names):
        names.sort(key=float)
    if "-1" in names and len(names) > 2:
        places = [r.place for r in records if class_name(r.label) == "-1"]
        raise DataError(
            f"{len(places)} records have the label -1 (for example {places[0]}), with which data sets mark labels that they keep "
            "secret. Leave these records out, or name all classes with labels."
        )
    if len(names) < 2:
        said = f"All labels of {source}" if source else "All labels"
        raise DataError(f"{said} are {names[0] if names else 'missing'!r}: there is nothing to tell apart.")
    if len(names) > _MOST_CLASSES:
        raise DataError(
            f"The labels are {len(names):,} different ones, {names[0]!r} and {names[1]!r} among them: more than classes could "
            "be. Set task: regression if they are quantities."
        )
    return names


def class_indices(records: Sequence[Record], names: Sequence[str], source: str) -> list[int]:
    """Return the number of each record's class among `names`.

    Raises one DataError with every record of another class.
    """
    known = {class_name(name): i for i, name in enumerate(names)}
    problems = [
        f"{r.place}: there is no class {class_name(r.label)!r}{nearest(class_name(r.label), known)}"
        for r in records
        if class_name(r.label) not in known
    ]
    if problems:
        raise DataError(f"{source}: {len(problems)} records are of classes other than {shown(names, 10)}:", problems)
    return [known[class_name(r.label)] for r in records]


def quantities(records: Sequence[Record], source: str) -> list[float]:
    """Return each record's label as a number. Raises one DataError with every record whose label is none."""
    values = [number(r.label) for r in records]
    problems = [
        f"{r.place}: {r.label!r} is no number"
        + (" (write a decimal point)" if _WITH_COMMAS.fullmatch(_text(r)) else "")
        for r, v in zip(records, values, strict=True)
        if v is None
    ]
    if problems:
        raise DataError(f"{source}: {len(problems)} labels are no numbers:", problems)
    return [v for v in values if v is not None]


def only_in_one(held: Sequence[Record], train: Sequence[Record], what: str = "held-out") -> str | None:
    """Return a warning where some classes have records in one set alone: their scores say nothing, or they cannot be learned.

    Args:
        held: the records that are scored.
        train: the records that are trained on.
        what: the name of the scored ones, for the warning.
    """
    scored, taught = ({class_name(r.label): None for r in records if r.label is not None} for records in (held, train))
    unseen, untaught = (
        [name for name in one if name not in other] for one, other in ((taught, scored), (scored, taught))
    )
    texts = [f"No {what} record is of class {shown(unseen, 5)}: the scores say nothing of it."] if unseen else []
    if untaught:
        texts.append(f"No record to train on is of class {shown(untaught, 5)}, which {what} records are of.")
    return " ".join(texts) or None
