"""A report as one self-contained HTML file. Knows nothing of models, runs or where a figure comes from.

The page loads nothing. Style and script are inline, and the content policy allows only these two, by their hash. So data cannot
run, even if the escaping had a hole.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaw.files.formats.atomic import write_text
from deltaw.runs.reports.charts import Chart, Series, render_chart
from deltaw.runs.reports.examples import Sample, render_examples
from deltaw.runs.reports.heatmap import HeatMap, render_map
from deltaw.runs.reports.markup import tag, text

__all__ = ["Chart", "HeatMap", "Report", "Sample", "Series", "Table", "render", "write"]

_FOLD_ROWS = 24
_LONG_WORD, _BRIEF = 30, 24
# Columns beyond which a table is set closer
_MANY = 9
_NUMBER = re.compile(
    r"[−+-]?\d[\d,.]*(e[−+-]?\d+)?\s?(%|×|[kMGT]?B?|m?s|min)?(\s*[\[(±–].*)?"  # 0.94 [0.90, 0.97], 4.9 MB, 2e-4, 96%
    r"|\[[\s\d.,−+-]*\]|[—–-]?|nan|[−+-]?inf",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Table:
    """Rows under columns. A cell is a text to show as it is, or a number."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    shaded: bool = False
    """Counts have a color by their share of their row."""
    named: bool = False
    """The first column names its row, though the names may be numbers."""


@dataclass(frozen=True)
class Report:
    """The contents of a page in plain values. Empty parts are not shown."""

    title: str
    headline: str
    facts: Sequence[tuple[str, str, str]] = ()
    """Label, value and note of each."""
    curves: Sequence[Chart] = ()
    maps: Sequence[HeatMap] = ()
    examples: Sequence[Sample] = ()
    tables: Sequence[Table] = ()
    warnings: Sequence[str] = ()
    commands: Sequence[str] = ()
    footer: str = ""


def render(report: Report) -> str:
    """Return the page as HTML."""
    css, script = _resource("report.css"), _resource("report.js")
    policy = (
        f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        tag("title", text(report.title)),
        f"<style>{css}</style>",
    ]
    sections = [_header(report), _warnings(report.warnings), _facts(report.facts), _charts(report.curves)]
    sections += [
        _maps(report.maps),
        render_examples(report.examples),
        _tables(report.tables),
        _commands(report.commands),
    ]
    foot = tag("footer", tag("p", text(report.footer))) if report.footer else ""
    body = tag("main", "\n".join(s for s in sections if s)) + foot + f"<script>{script}</script>"
    return f'<!doctype html>\n<html lang="en">\n<head>\n{"".join(head)}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def write(report: Report, path: Path) -> Path:
    """Write the page to `path` atomically: a crash leaves the old file or the new one, never half of one."""
    return write_text(Path(path), render(report))


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(inline: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def _section(title: str, inner: str, kind: str) -> str:
    return tag("section", tag("h2", title, id=kind) + inner, cls=kind, aria_labelledby=kind)


def _header(report: Report) -> str:
    mark = tag("span", "ΔW", cls="mark", aria_hidden="true")
    return tag(
        "header", tag("h1", mark + tag("span", text(report.title))) + tag("p", text(report.headline), cls="headline")
    )


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    title = "To note" if len(warnings) == 1 else f"{len(warnings)} things to note"
    return _section(title, tag("ul", "".join(tag("li", text(w)) for w in warnings)), "warnings")


def _facts(facts: Sequence[tuple[str, str, str]]) -> str:
    """The facts as cards, in even rows of at most five."""
    if not facts:
        return ""
    across = math.ceil(len(facts) / math.ceil(len(facts) / 5))
    cards = []
    for label, value, note in facts:
        small = tag("dd", text(note), cls="note") if note else ""
        cards.append(tag("div", tag("dt", text(label)) + tag("dd", text(value), cls="value") + small))
    return tag("section", tag("dl", "".join(cards), cls=f"across-{across}"), cls="facts", aria_label="Key figures")


def _charts(charts: Sequence[Chart]) -> str:
    """The charts: the first and those with bars take the full width, the others share rows of two or three."""
    if not charts:
        return ""
    wide = [i == 0 or any(s.style == "bars" for s in c.series) for i, c in enumerate(charts)]
    narrow = wide.count(False)
    across = 3 if narrow % 3 == 0 else 2
    if narrow % across:
        wide[len(wide) - 1 - wide[::-1].index(False)] = True
    # Narrow ones follow the first chart at once, so that no row stays half empty
    order = sorted(range(len(charts)), key=lambda i: i > 0 and wide[i])
    figures = "".join(render_chart(charts[i], wide=wide[i]) for i in order)
    return _section("Curves", tag("div", figures, cls=f"charts across-{across}"), "curves")


def _maps(maps: Sequence[HeatMap]) -> str:
    if not maps:
        return ""
    figures = "".join(map(render_map, maps))
    return _section("Directions", tag("div", figures, cls=f"charts across-{min(3, len(maps))}"), "maps")


def _tables(tables: Sequence[Table]) -> str:
    return _section("Details", tag("div", "".join(map(_table, tables)), cls="tables"), "details") if tables else ""


def _table(table: Table) -> str:
    """A table in a box that scrolls, so that the page never scrolls sideways; a long one is folded."""
    cells = [[_cell(c) for c in row] for row in table.rows]
    width = max([len(table.columns), *map(len, cells)])
    numeric = [bool(cells) and all(_NUMBER.fullmatch(row[i]) for row in cells if i < len(row)) for i in range(width)]
    kind = ["num" if n and not (table.named and i == 0) else None for i, n in enumerate(numeric)]
    head = "".join(tag("th", text(c), scope="col", cls=k) for c, k in zip(table.columns, kind, strict=False))
    shades = [_shades(row) if table.shaded else [""] * width for row in table.rows]
    rows = "".join(
        tag("tr", "".join(_td(c, k, shade) for c, k, shade in zip(row, kind, of_row, strict=False)))
        for row, of_row in zip(cells, shades, strict=True)
    )
    inner = tag("table", tag("thead", tag("tr", head)) + tag("tbody", rows), cls="many" if width > _MANY else None)
    box = tag("div", inner, cls="scroll", tabindex=0, role="region", aria_label=table.title)
    count = len(cells)
    if not cells:
        box = tag("p", "No rows.", cls="empty")
    elif count > _FOLD_ROWS:
        box = tag("details", tag("summary", f"All {count:,} rows") + box)
    note = tag("p", text(table.note), cls="note") if table.note else ""
    return tag("article", tag("h3", text(table.title)) + note + box, cls="small" if width <= 2 else "wide")


def _words(command: str) -> str:
    """A command whose line may break between words, but not after the hyphens of a flag."""
    return "".join(text(w) if not w or w.isspace() else tag("span", text(w)) for w in re.split(r"(\s+)", command))


def _td(cell: str, kind: str | None, shade: str = "") -> str:
    """A cell; only words that are too long for a column may break anywhere."""
    long = any(len(w) > _LONG_WORD for w in cell.split())
    width = kind or ("long" if long else "brief" if len(cell) <= _BRIEF else "")
    return tag("td", _breakable(cell) if kind else text(cell), cls=f"{width} {shade}".strip() or None)


def _breakable(cell: str) -> str:
    """A number whose interval may go to a line of its own."""
    value, opened, ends = cell.partition(" [")
    return tag("span", text(value)) + " " + tag("span", text(f"[{ends}")) if opened and value else text(cell)


_SHADES = 8


def _shades(row: Sequence[object]) -> list[str]:
    """The class of each cell: its count's share of the row's in eighths, none for 0 and for words."""
    counts = [cell if isinstance(cell, int) else 0 for cell in row]
    total = max(1, sum(counts))
    return [f"shade{math.ceil(_SHADES * count / total)}" if count else "" for count in counts]


def _cell(value: object) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return (f"{value:,}" if isinstance(value, int) else f"{value:.4g}").replace("-", "−", 1)


def _commands(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    lines = "".join(tag("li", tag("div", tag("code", _words(c)), cls="command")) for c in commands)
    return _section("Next", tag("ol", lines), "next")
