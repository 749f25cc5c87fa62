"""Checked records of a source, or one DataError that lists every bad one. Knows no tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from deltaw.config import DataConfig
from deltaw.data import forms, sources
from deltaw.data.fields.columns import IGNORE, picture_of
from deltaw.data.fields.names import FIELDS, Asked
from deltaw.data.fields.taken import Taken, left_out, take
from deltaw.data.forms import Record
from deltaw.data.prompts import question_of
from deltaw.errors import DataError


@dataclass(frozen=True)
class Records:
    """Checked records of one form."""

    items: list[Record]
    form: str
    """One of FIELDS."""
    source: str
    """The name for messages."""
    notes: tuple[str, ...] = ()
    """Sentences on how the source was read, where that is no matter of course."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Field of the source that is not used → how many rows have it."""

    def __len__(self) -> int:
        return len(self.items)

    def only(self, numbers: Sequence[int]) -> Records:
        """Return the records of these numbers, in their order."""
        return replace(self, items=[self.items[i] for i in numbers])

    def __iter__(self) -> Iterator[Record]:
        return iter(self.items)


def read(
    source: sources.Source,
    config: DataConfig,
    *,
    split: str | None = None,
    completions: bool = True,
) -> Records:
    """Return all records of a file, a list, or a split of a folder or hub data set.

    Args:
        source: a path, hub id, list of dicts or data set.
        config: form, task, columns, encoding and split of the records. The trainer applies `max_records`.
        split: takes precedence over `config.split`, which is ignored for sources without splits.
        completions: False reads prompts alone, to generate from. Answers may be missing and are ignored, except in chats that
            end with one.

    Raises one DataError with every record that cannot be used; only blank lines are skipped.
    """
    return checked(source, config, split=split, completions=completions)[0]


def checked(
    source: sources.Source, config: DataConfig, *, split: str | None = None, completions: bool = True
) -> tuple[Records, list[Mapping[str, object]]]:
    """Return the records as `read` does, and of each the fields that make it, under the names that forms know.

    Raises DataError as `read` does.
    """
    picture = picture_of(config.columns)
    read = sources.rows(source, split, config.split, sources.Reading(config.encoding, picture))
    total = len(read.rows) + len(read.problems)
    if not total:
        raise DataError(
            f"{read.name}: no records in it. Each record is one JSON object a line, one CSV row, or one dict."
        )
    if not read.rows:
        raise DataError(f"{read.name}: none of its {total} records can be read:", read.problems)
    labels = config.task != "causal"
    return _made(take(read, config.columns, Asked(config.form, completions, labels)), read, completions=completions)


def _made(taken: Taken, read: sources.Read, *, completions: bool) -> tuple[Records, list[Mapping[str, object]]]:
    """Return the records that the fields of a source make, and the fields of each."""
    items: list[Record] = []
    fields: list[Mapping[str, object]] = []
    problems = [*read.problems, *taken.problems]
    ignored = Counter(taken.ignored)
    for part in taken.parts:
        record = forms.make(part.form, part.place, part.fields, completions=completions)
        if isinstance(record, Record):
            ignored.update(part.fields.names.get(name, name) for name in record.unused)
            items.append(forms.after(record, part.before) if part.before else record)
            fields.append(part.fields if part.written is None else part.written)
        else:
            problems.extend(record)
    if problems or taken.refusals:
        raise _unusable(read, taken, problems)
    form = "chat" if any(record.form == "chat" for record in items) else taken.form
    for i, record in enumerate(items):
        if record.form != form or taken.parts[i].before:
            items[i] = forms.after(record, ())
            fields[i] = {"messages": [{"role": m.role, "content": m.content} for m in items[i].conversation]}
    return Records(items, form, read.name, taken.notes, ignored), fields


def _unusable(read: sources.Read, taken: Taken, problems: Sequence[str]) -> DataError:
    """Return the error of records that cannot be used: fields that would be lost, then records by their places."""
    places = {_by_place(line)[:2] for line in problems}
    count = len(read.rows) + len(read.problems)
    what = f"{taken.form} records ({FIELDS[taken.form]})"
    head = f"{len(places):,} of {count:,} records cannot be used as {what}"
    if not problems:
        head = f"fields of its records have a meaning that {what} have no place for"
    advice = f"--columns {IGNORE}=NAME leaves a field out on purpose." if taken.refusals else ""
    return DataError(f"{read.name}: {head}:", [*taken.refusals, *sorted(problems, key=_by_place)], advice)


def _by_place(problem: str) -> tuple[str, int]:
    """Return a key that sorts lines that begin with `file:17` or `name[17]` as they stand in the data."""
    place = re.match(r"(.*?)[:\[](\d+)", problem)
    return (place[1], int(place[2])) if place else (problem, 0)


def references(records: Sequence[Record] | Records) -> list[tuple[Record, list[str]]]:
    """Return the first record of each question with all completions of that question, in first-seen order."""
    items: dict[Hashable, tuple[Record, list[str]]] = {}
    for record in records:
        item = items.setdefault(question_of(record), (record, []))
        if record.completion is not None:
            item[1].append(record.completion)
    return list(items.values())


def notes_of(parts: Iterable[Records | None]) -> tuple[str, ...]:
    """Return sentences on how sources were read, and on the fields that are not used, each named once with its records."""
    there = [part for part in parts if part is not None]
    ignored: Counter[str] = Counter()
    for part in there:
        ignored.update(part.ignored)
    notes = [note for part in there for note in part.notes]
    return tuple(dict.fromkeys([*notes, *filter(None, [left_out(ignored)])]))
