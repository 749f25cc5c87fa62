"""Small pieces of safe HTML. Knows escaping; nothing of reports or charts.

Data passes through `text` (or `attributes`) exactly once; everything else is a literal of ours.
"""

from __future__ import annotations

import html

from deltaw.errors import visible

_INNER = ("article", "div", "dl", "figure", "main", "ol", "section", "table", "tbody", "thead")


def text(value: object) -> str:
    """Return `value` as characters of a page: escaped, control characters and lone surrogates made visible."""
    return html.escape(visible(str(value)), quote=True)


def attributes(**values: object) -> str:
    """Return ` name="value"` for each; `cls` is class, `_` becomes `-`, None is left out, True is a bare name."""
    parts = []
    for key, value in values.items():
        name = {"cls": "class"}.get(key, key.rstrip("_").replace("_", "-"))
        if value is True:
            parts.append(f" {name}")
        elif value is not None and value is not False:
            parts.append(f' {name}="{text(value)}"')
    return "".join(parts)


def tag(name: str, inner: str = "", **values: object) -> str:
    """Return `<name …>inner</name>`; `inner` is HTML already. Only containers get line breaks."""
    pad = "\n" if name in _INNER else ""
    return f"<{name}{attributes(**values)}>{pad}{inner}{pad}</{name}>"
