"""All rows of a source under the names that forms know, with every problem, and the fields that were left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from deltaw.data.chats.reading import SYSTEM
from deltaw.data.fields.columns import Columns, columns_of, has, head_of, value_at
from deltaw.data.fields.meaning import MEDIA, TOOLS, Why, is_empty, of_pairs, refused, turns_before, weighed
from deltaw.data.fields.names import (
    HISTORY,
    TALKS,
    Asked,
    Named,
    Reading,
    are_turns,
    called,
    differing,
    plain,
    readings,
    recognise,
)
from deltaw.data.sources import Fields, Read, show
from deltaw.errors import DataError, shown

_PLACES = 3  # records that a problem of many names


class Part(NamedTuple):
    """The fields that make one record. A row with several answers makes several."""

    place: str
    form: str
    fields: Named
    before: tuple[tuple[str, str], ...] = ()
    """Roles and texts of turns that stand before the question."""
    written: Fields | None = None
    """The row as it was, where it makes this record alone and without the user's columns."""


@dataclass(frozen=True)
class Taken:
    """The rows of a source."""

    form: str
    parts: list[Part]
    problems: list[str]
    """Lines, each with its place."""
    refusals: list[str]
    """Lines of fields that carry meaning and are not used, each with how many records have it."""
    ignored: Mapping[str, int]
    """Field that is not used → how many records have it."""
    notes: tuple[str, ...]
    """Sentences on how the rows were read."""


@dataclass
class _Sums:
    """Sums over the rows."""

    problems: list[str] = field(default_factory=list)
    refusals: dict[Why, list[str]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)


def take(read: Read, columns: str, asked: Asked) -> Taken:
    """Return the rows of a source, each as the fields of one record or more.

    Args:
        read: the rows, one at least.
        columns: the user's columns; see columns.py.
        asked: what the caller wants of the records. Its columns are set here.

    Raises:
        ConfigError: the columns cannot be used.
        DataError: the fields make no form or several, or the records are preference pairs.
    """
    chosen = columns_of(columns, read.rows, read.name, answers=asked.completions)
    asked = replace(asked, columns=frozenset(chosen.taken))
    sums = _Sums()
    known: dict[tuple[str, ...], _Layout] = {}
    rows = [_named(fields, chosen, known) for _, fields in read.rows]
    places = [place for place, _ in read.rows]
    if asked.completions:
        _check_pairs(rows, places, read.name)
    reading = recognise(rows, places, read.name, asked)
    parts: list[Part] = []
    for (place, fields), row in zip(read.rows, rows, strict=True):
        new = list(_parts(place, row, reading, asked, sums))
        parts += new if columns or len(new) > 1 else [part._replace(written=fields) for part in new]
        if any(name.endswith(" ") for name in row):
            sums.problems += [f"{place}: {line}" for line in _clashes(fields)]
        for name in chosen.ignored:
            sums.ignored[name] += not is_empty(fields.get(name))
    if asked.completions:
        sums.refusals |= weighed(rows, places, reading.form)
    refusals = [f"{name!r} ({_counted(there)}) {why}" for (name, why), there in sums.refusals.items()]
    return Taken(
        reading.form, parts, sums.problems, refusals, +sums.ignored, (*read.notes, *_synonyms(reading, rows, chosen))
    )


def _check_pairs(rows: Sequence[Named], places: Sequence[str], source: str) -> None:
    """Raise DataError for preference pairs."""
    ways = [of_pairs(row) for row in rows]
    there = [place for place, way in zip(places, ways, strict=True) if way is not None]
    if there:
        way = next(filter(None, ways))
        raise DataError(f"{source}: {len(there):,} of {len(rows):,} records ({_first(there)}): {way}.")


class _Layout(NamedTuple):
    """The fields that rows have, under the names that forms know. Rows of equal fields share one."""

    names: dict[str, str]
    """Name → field, or the path into it."""
    fields: list[tuple[str, str]]
    """Name and field of all that are no user's columns."""
    there: list[str]


def _layout(keys: Sequence[str], columns: Columns, heads: Collection[str]) -> _Layout:
    names = dict(columns.taken)
    fields: list[tuple[str, str]] = []
    for key in keys:
        if key in heads or key in columns.ignored:
            continue
        name = plain(str(key))
        while name in names:  # another field has the name, which counts
            name = f"{name} "
        names[name] = str(key)
        fields.append((name, key))
    return _Layout(names, fields, [str(key) for key in keys])


def _named(fields: Fields, columns: Columns, known: dict[tuple[str, ...], _Layout]) -> Named:
    """Return a row's values under the names that forms know: the user's columns, then all others."""
    keys = tuple(fields)
    layout = known.get(keys)
    if layout is None:
        layout = known[keys] = _layout(keys, columns, {head_of(fields, path) for path in columns.taken.values()})
    values = {name: value_at(fields, path) for name, path in columns.taken.items() if has(fields, path)}
    values.update((name, fields[key]) for name, key in layout.fields)
    return Named(values, layout.names, layout.there)


def _clashes(fields: Fields) -> list[str]:
    """Return a line for fields whose names differ in capitals alone, where forms know them."""
    by_name: dict[str, list[str]] = {}
    for key, value in fields.items():
        if value is not None:
            by_name.setdefault(plain(str(key)), []).append(str(key))
    return [
        f"the fields {' and '.join(map(repr, keys))} are one name; leave one"
        for keys in by_name.values()
        if len(keys) > 1
    ]


def _parts(place: str, row: Named, reading: Reading, asked: Asked, sums: _Sums) -> Iterator[Part]:
    """Yield the fields of each record that a row makes. What is wrong, and what is left out, is added to the sums."""
    alike = readings(row, asked)
    if len(alike) > 1:
        sums.refusals.setdefault(("fields", f"fit more than one form: {differing(alike)}"), []).append(place)
    elif alike and alike[0].form == reading.form:
        reading = alike[0]
    lines: list[str] = []
    used, before = set(reading.used), list[tuple[str, str]]()
    if reading.form in ("prompt", "instruction") and not _BEFORE.isdisjoint(row):
        before, others = turns_before(row, lines)
        used.update(others)
    if reading.form == "chat":
        new = [Part(place, "chat", row)]
    else:
        new = _of_texts(place, row, reading, tuple(before), asked, lines)
    is_chat = any(part.form == "chat" for part in new)
    if is_chat:
        used |= _CHAT
    rest = [name for name, value in row.items() if name not in used and not is_empty(value)]
    for why in refused(rest, row, reading, used, asked):
        sums.refusals.setdefault(why, []).append(place)
    if not is_chat:  # a conversation's fields are told with it
        for name in rest:
            sums.ignored[row.names.get(name, name)] += 1
    sums.problems += [f"{place}: {line}" for line in lines]
    yield from () if lines else new


_BEFORE = {*SYSTEM, *HISTORY}
_CHAT = {*TALKS, *SYSTEM, *MEDIA, *TOOLS}
"""Fields that are read, or refused, with the conversation (chats/reading.py)."""


def _of_texts(
    place: str, row: Named, reading: Reading, before: tuple[tuple[str, str], ...], asked: Asked, lines: list[str]
) -> list[Part]:
    """Return the parts of a row that is no conversation yet: one for each answer."""
    names = _called(reading.takes, row)
    values = {name: row[field_] for name, field_ in reading.takes if field_ in row}
    answer = {"prompt": "completion", "instruction": "output"}.get(reading.form)
    answers = values.get(answer) if answer is not None and asked.completions else None
    if answer is None or not isinstance(answers, (list, tuple)) or are_turns(answers):
        return [_part(place, Named(values, names, row.there), row, reading, before, lines)]
    if not answers:
        lines.append(f"field {names[answer]!r} is a list without an answer")
    several = len(answers) > 1
    return [
        _part(
            f"{place}, answer {i}" if several else place,
            Named(values | {answer: text}, names | {answer: f"{names[answer]}[{i - 1}]"}, row.there),
            row,
            reading,
            before,
            lines,
        )
        for i, text in enumerate(answers, 1)
    ]


def _called(takes: Sequence[tuple[str, str]], row: Named) -> dict[str, str]:
    """Return what the record calls the fields that a form takes."""
    return {name: row.names.get(field_, field_) for name, field_ in takes}


def _part(
    place: str, fields: Named, row: Named, reading: Reading, before: tuple[tuple[str, str], ...], lines: list[str]
) -> Part:
    """Return the part of a row with one answer. A question or an answer that is a list of messages makes a conversation of it."""
    if reading.form == "prompt" and any(are_turns(value) for value in fields.values()):
        return _of_lists(place, fields, row, reading, before, lines)
    return Part(place, reading.form, fields, before)


def _of_lists(
    place: str, fields: Named, row: Named, reading: Reading, before: Sequence[tuple[str, str]], lines: list[str]
) -> Part:
    """Return the conversation of a question and an answer of which one is a list of messages, the other too or a text."""
    turns: dict[str, list[object]] = {}
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            turns[name] = [{"role": role, "content": value}]
        elif are_turns(value):
            turns[name] = [*value]  # type: ignore[misc]
        elif name in fields:
            lines.append(f"field {called(fields, name)!r} must be text or a list of messages, found {show(value)}")
    turns["prompt"] = [*({"role": role, "content": text} for role, text in before), *turns.get("prompt", [])]
    rest = {name: value for name, value in row.items() if name not in {*reading.used, *SYSTEM, *HISTORY}}
    return Part(place, "chat", Named({**rest, **turns}, row.names, row.there))


def _synonyms(reading: Reading, rows: Sequence[Named], columns: Columns) -> list[str]:
    """Return a sentence on fields that are taken under other names, unless the user named them."""
    if reading.form not in ("prompt", "instruction"):
        return []
    first = next((row for row in rows if set(reading.used) <= set(row)), None)
    names = first.names if first is not None else {}
    other = [
        f"{names.get(field_, field_)} as {name}"
        for name, field_ in reading.takes
        if field_ != name and name not in columns.taken
    ]
    return [f"taken: {', '.join(other)}"] if other else []


def left_out(ignored: Mapping[str, int]) -> str | None:
    """Return a sentence on the fields that are not used: "ignored: ticket_id, priority (300 records)"; None without any."""
    by_count: dict[int, list[str]] = {}
    for name, count in ignored.items():
        by_count.setdefault(count, []).append(name)
    groups = [f"{', '.join(names)} ({_records(count)})" for count, names in by_count.items()]
    return f"ignored: {'; '.join(groups)}" if groups else None


def _counted(places: Sequence[str]) -> str:
    return f"{_records(len(places))}: {_first(places)}"


def _first(places: Sequence[str]) -> str:
    return shown(places, _PLACES)


def _records(count: int) -> str:
    return f"{count:,} record{'s' * (count != 1)}"
