"""Sources and forms together: checked records, or one DataError that lists every bad one. Knows no tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.config import DataConfig
from deltaw.data import forms, sources
from deltaw.data.forms import Record
from deltaw.data.prompts import question_of
from deltaw.errors import DataError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Records:
    """Checked records of one form, one of forms.FIELDS."""

    items: list[Record]
    form: str
    source: str

    def __len__(self) -> int:
        return len(self.items)

    def only(self, numbers: Sequence[int]) -> Records:
        """These of them, in the order given."""
        return replace(self, items=[self.items[i] for i in numbers])

    def __iter__(self) -> Iterator[Record]:
        return iter(self.items)


def read(
    source: str | Path | list[dict[str, Any]] | datasets.Dataset,
    config: DataConfig,
    *,
    split: str | None = None,
    completions: bool = True,
) -> Records:
    """All records of a file, a list, or a split of a folder or hub data set. The trainer applies `config.max_records`.

    `split` goes before `config.split`, which is ignored for sources without splits. `completions=False` reads prompts
    alone, to generate from: answers may be missing and are ignored, but for chats that end with one.
    Raises one DataError with every record that cannot be used; nothing is skipped but blank lines.
    """
    rows, problems, name = sources.rows(source, split, config.split)
    return checked(rows, problems, name, config, completions=completions)


def checked(
    rows: Sequence[sources.Row], problems: list[str], name: str, config: DataConfig, *, completions: bool = True
) -> Records:
    """The rows of a source as records, one each in their order. `problems` are those met in reading them. Raises DataError as
    `read` does."""
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
        made = forms.make(resolved, place, fields, completions=completions)
        if isinstance(made, Record):
            items.append(made)
        else:
            problems.extend(made)
    if problems:
        bad = total - len(items)
        head = f"{name}: {bad} of {total} records cannot be used as {resolved} records ({forms.FIELDS[resolved]}):"
        raise DataError(head, sorted(problems, key=_by_place))
    return Records(items, resolved, name)


def _by_place(problem: str) -> tuple[str, int]:
    """Sorts lines that begin with `file:17` or `name[17]` as they stand in the data."""
    found = re.match(r"(.*?)[:\[](\d+)", problem)
    return (found[1], int(found[2])) if found else (problem, 0)


def references(records: Sequence[Record] | Records) -> list[tuple[Record, list[str]]]:
    """What is to be answered: the first record of each question, and all completions of that question, in first-seen order."""
    items: dict[Any, tuple[Record, list[str]]] = {}
    for record in records:
        item = items.setdefault(question_of(record), (record, []))
        if record.completion is not None:
            item[1].append(record.completion)
    return list(items.values())
