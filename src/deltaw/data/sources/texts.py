"""Plain text and Markdown → text records. A record is a paragraph of plain text, a section of Markdown, or a whole file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deltaw.data.sources.row import Read, Row, line_of, not_utf8

_HEADING = re.compile(r" {0,3}#{1,6}(\s|$)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def document(raw: bytes, name: str) -> Read:
    """Return a file as one record, without blank lines around it."""
    return _records(raw, name, whole=True)


def paragraphs(raw: bytes, name: str) -> Read:
    """Return a record for each paragraph: lines with no blank one between them."""
    return _records(raw, name)


def markdown(raw: bytes, name: str) -> Read:
    """Return a record for each section: a heading (#) and what follows it. A heading without text goes with the next one.

    A file without headings is cut into paragraphs. A line of a fenced block of code is no heading.
    """
    return _records(raw, name, headings=True)


def _records(raw: bytes, name: str, *, whole: bool = False, headings: bool = False) -> Read:
    try:
        lines = raw.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        return Read([], [f"{name}:{line_of(raw, error.start)}: {not_utf8(error)}"])
    starts, what = ([0], "") if whole else (_sections(lines) if headings else [], "sections")
    if not starts:
        starts, what = (
            [i for i, line in enumerate(lines) if line.strip() and not (i and lines[i - 1].strip())],
            "paragraphs",
        )
    if not starts:
        return Read([], [])
    rows: list[Row] = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        filled = [i for i in range(start, end) if lines[i].strip()]
        if filled:
            rows.append((f"{name}:{filled[0] + 1}", {"text": "\n".join(lines[filled[0] : filled[-1] + 1])}))
    notes = () if whole or not rows else (f"{name}: each of its {len(rows):,} {what} is a record",)
    return Read(rows, [], notes)


def _sections(lines: Sequence[str]) -> list[int]:
    """Return the lines on which a section starts; none where there is no heading."""
    starts: list[int] = []
    fence, filled = "", False
    for i, line in enumerate(lines):
        mark = _FENCE.match(line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]) else fence
            filled = True
        elif _HEADING.match(line):
            if filled or not starts:
                starts.append(i)
            filled = False
        else:
            fence = mark[1] if mark else ""
            filled = filled or bool(line.strip())
    if not starts:
        return []
    return starts if starts[0] == 0 else [0, *starts]
