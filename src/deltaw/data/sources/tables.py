"""CSV and parquet → rows.

The columns of a CSV file are divided by commas, semicolons, tabs or bars: by what divides the header and the first rows alike.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.data.sources.row import Fields, Read, Row, bare, line_of, not_utf8
from deltaw.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow

_MARKS = (",", ";", "\t", "|")
_NAMES = {";": "semicolons", "\t": "tabs", "|": "bars"}
_NUMBERS = "(first column, without a name)"
_TRIED = 20  # rows by which a separator is chosen


def table(raw: bytes, name: str) -> Read:
    """Read a header, then rows. A place is the line on which the row starts, as quoted cells may span lines."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Read([], [f"{name}:{line_of(raw, error.start)}: {not_utf8(error)}"])
    if "\n" not in text:  # Excel's for the Macintosh
        text = text.replace("\r", "\n")
    if text.lstrip()[:2] in ('{"', "[{"):
        return Read([], [f"{name}:1: not CSV: it begins as JSON does. Name the file {name.rpartition('.')[0]}.jsonl."])
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
    try:
        mark, first = _separator(text)
        spaced = _is_spaced(text, mark, first)
        read = _rows(text, mark, first, name, spaced)
    finally:
        csv.field_size_limit(limit)
    usual = mark == "," or (mark == "\t" and name.lower().endswith(".tsv"))
    notes = [f"{name}: its columns are divided by {_NAMES.get(mark, repr(mark))}"] * (not usual)
    notes += [f"{name}: the spaces that follow what divides its columns are left out"] * spaced
    return Read(read.rows, read.problems, tuple(notes))


def _is_spaced(text: str, mark: str, first: int) -> bool:
    """Return whether a space follows each mark in the header, so that it is no part of the cells."""
    header = "".join(text.split("\n", first)[first - 1 : first])
    return mark != "\t" and header.count(mark) > 0 and header.count(mark) == header.count(f"{mark} ")


def _separator(text: str) -> tuple[str, int]:
    """Return what divides the columns, and the line of the header. Excel's first line `sep=;` says it."""
    line = text.partition("\n")[0].rstrip("\r").strip('"')
    if line.lower().startswith("sep=") and len(line) == 5:
        return line[4], 2
    agreement = {mark: _agreement(text, mark) for mark in _MARKS}
    return max(_MARKS, key=lambda mark: agreement[mark]), 1  # the first of equal ones: a comma


def _agreement(text: str, mark: str) -> float:
    """Return the share of the first rows that have as many cells as the header; -1 where the mark divides no header."""
    rows: list[list[str]] = []
    try:
        for cells in csv.reader(io.StringIO(text, newline="\n"), delimiter=mark, strict=True):
            rows += [cells] if cells else []
            if len(rows) > _TRIED:
                break
    except csv.Error:
        pass
    if not rows or len(rows[0]) < 2:
        return -1
    return sum(len(cells) == len(rows[0]) for cells in rows) / len(rows)


def _rows(text: str, mark: str, first: int, name: str, spaced: bool) -> Read:
    rows: list[Row] = []
    problems: list[str] = []
    header: list[str] = []
    try:
        for start, cells in _cells(text, mark, first, spaced):
            place = f"{name}:{start}"
            if not header:
                header = cells if cells[0].strip() else [_NUMBERS, *cells[1:]]
                twice = [c for c in dict.fromkeys(cells) if c.strip() and cells.count(c) > 1]
                if twice:
                    return Read([], [f"{place}: column {c!r} is there more than once; rename one" for c in twice])
            elif len(cells) != len(header):
                problems.append(
                    f"{place}: {len(cells)} cells under {len(header)} columns ({', '.join(header)}). "
                    f"Put cells that contain {_NAMES.get(mark, 'commas')} or line breaks in double quotes."
                )
            else:
                if _is_unnamed(header, cells):
                    problems.append(f"{place}: a cell stands under no column's name; name the column in the header")
                else:
                    rows.append((place, {c: cell for c, cell in zip(header, cells, strict=True) if c.strip()}))
    except _NotCSV as error:
        problems.append(
            f"{name}:{error.line}: not CSV: {error}. Is a double quote missing in the row that starts here?"
        )
    return Read(rows, problems)


def _is_unnamed(header: Sequence[str], cells: Sequence[str]) -> bool:
    """Return whether a cell has a text under no name. Numbers of rows, in the first column, are no loss (pandas writes them)."""
    if header[0] == _NUMBERS and cells[0].strip() and not cells[0].strip().isdecimal():
        return True
    return any(cell.strip() for name, cell in zip(header, cells, strict=True) if not name.strip())


class _NotCSV(Exception):
    """A row that is no CSV, by its first line."""

    def __init__(self, text: str, line: int) -> None:
        super().__init__(text)
        self.line = line


def _cells(text: str, mark: str, first: int, spaced: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's first line and its cells. Blank lines are none, nor are rows of separators alone at the end (Excel's)."""
    lines = text.split("\n")
    rest = io.StringIO("\n".join(lines[first - 1 :]), newline="\n")
    reader = csv.reader(rest, delimiter=mark, strict=True, skipinitialspace=spaced)
    start = first
    empty: list[tuple[int, list[str]]] = []
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _NotCSV(str(error), start) from error
        if cells and lines[start - 1].strip(mark + "\r \t"):
            yield from empty
            empty = []
            yield start, cells
        elif len(cells) > 1:
            empty.append((start, cells))  # a record without values, if another one follows
        start = first + reader.line_num


def parquet(path: Path) -> Read:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:  # for damaged bytes the library and its metadata's readers raise dozens of types
        raise DataError(f"{path}: not a readable parquet file: {first_line(error)}") from error
    if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
        return Read([], [f"{path.name}: column {name!r} is there more than once; rename one" for name in twice])
    try:
        return Read([(f"{path.name}[{i}]", _of_table(row)) for i, row in enumerate(table.to_pylist())], [])
    except (pyarrow.ArrowException, ValueError, OverflowError):  # bytes that are no UTF-8, a date that Python has not
        return _by_rows(table, path.name)


def _of_table(row: Fields) -> Fields:
    return {name: bare(value) for name, value in row.items()}


def _by_rows(table: pyarrow.Table, name: str) -> Read:
    """Return the rows of a table one by one, and those that have a value which Python cannot hold as problems."""
    import pyarrow

    rows: list[Row] = []
    problems: list[str] = []
    for i in range(len(table)):
        try:
            rows.append((f"{name}[{i}]", _of_table(table.slice(i, 1).to_pylist()[0])))
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            problems.append(f"{name}[{i}]: a value cannot be read: {first_line(error)}")
    return Read(rows, problems)
