"""Checked records of a source, or one DataError that lists every bad one. Knows no tokenizer."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from deltaw.config import DataConfig
from deltaw.data import forms, sources
from deltaw.data.forms import Record
from deltaw.data.prompts import question_of
from deltaw.errors import DataError


@dataclass(frozen=True)
class Records:
    """Checked records of one form."""

    items: list[Record]
    form: str
    """One of forms.FIELDS."""
    source: str
    """The name for messages."""

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
        config: form, task and split of the records. The trainer applies `max_records`.
        split: takes precedence over `config.split`, which is ignored for sources without splits.
        completions: False reads prompts alone, to generate from. Answers may be missing and are ignored, except in chats that
            end with one.

    Raises one DataError with every record that cannot be used; only blank lines are skipped.
    """
    rows, problems, name = sources.rows(source, split, config.split)
    return checked(rows, problems, name, config, completions=completions)


def checked(
    rows: Sequence[sources.Row], problems: list[str], name: str, config: DataConfig, *, completions: bool = True
) -> Records:
    """Return the rows of a source as records, one each in their order. `problems` were met in reading them.

    Raises DataError as `read` does.
    """
    total = len(rows) + len(problems)
    if not total:
        raise DataError(f"{name}: no records in it. Each record is one JSON object a line, one CSV row, or one dict.")
    if not rows:
        raise DataError(f"{name}: none of its {total} records can be read:", problems)
    form = config.form
    resolved: str = form
    if form == "auto":
        resolved = forms.recognise(rows, name, completions=completions, labels=config.task != "causal")
    items: list[Record] = []
    for place, fields in rows:
        record = forms.make(resolved, place, fields, completions=completions)
        if isinstance(record, Record):
            items.append(record)
        else:
            problems.extend(record)
    if problems:
        bad = total - len(items)
        head = f"{name}: {bad} of {total} records cannot be used as {resolved} records ({forms.FIELDS[resolved]}):"
        raise DataError(head, sorted(problems, key=_by_place))
    return Records(items, resolved, name)


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
