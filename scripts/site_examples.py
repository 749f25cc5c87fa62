"""Show the examples of docstrings as code in the site (a griffe extension of mkdocs.yml).

Docstrings here hold examples as plain ">>>" lines up to a blank one. Markdown would take these for quotations.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^([ ]*)>>> .*(?:\n\1(?=\S).*|\n\1[ ]+\S.*)*", re.MULTILINE)


class Examples(griffe.Extension):
    """Puts a fence around each example."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
