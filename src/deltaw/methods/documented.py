"""The texts under the fields of methods' and other settings: for the command line's help, and for Python's `help()`.

A text begins with one sentence that says what the field is, which is the flag's help. Units, range and source follow.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SECTION = re.compile(r"^(Args|Raises|Returns|Yields|Example):$|^>>> ", re.MULTILINE)
_WIDTH = 110


def field_texts(cls: type) -> dict[str, str]:
    """Return field → the text under it, of a dataclass and its parents. A field without a text, or source, is left out."""
    texts: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        texts |= _in_module(part.__module__).get(part.__qualname__, {})
    return texts


@functools.cache
def _in_module(name: str) -> dict[str, dict[str, str]]:
    """Return class → field → text, of a module's classes; nothing where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[name]))
    except (KeyError, OSError, TypeError):  # a class that a program makes, or an installation without source
        return {}
    return {node.name: _under_fields(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _under_fields(cls: ast.ClassDef) -> dict[str, str]:
    return {
        field.target.id: " ".join(text.split())
        for field, below in itertools.pairwise(cls.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and (text := _text_of(below))
    }


def _text_of(node: ast.stmt) -> str | None:
    """Return the text of a statement that is one text and nothing else."""
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def sentences(text: str) -> list[str]:
    """Return the sentences of a text.

    >>> sentences("A sum (Hu et al. 2021). At least 1. Default: the rank.")
    ['A sum (Hu et al. 2021).', 'At least 1.', 'Default: the rank.']
    """
    return re.split(r"(?:(?<=\.)|(?<=\.\))) (?=[A-ZΔα(]|auto: )", text) if text else []


def _wrapped(text: str) -> list[str]:
    indent = " " * 8
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def in_order(cls: type[DataclassInstance]) -> list[dataclasses.Field[object]]:
    """Return the fields as a call takes them: those that are only named come last."""
    return sorted(dataclasses.fields(cls), key=lambda field: field.kw_only is True)


def document(cls: type) -> None:
    """Add a dataclass's fields to its docstring, each with its type, default and text. `help(cls)` shows no others."""
    if not dataclasses.is_dataclass(cls) or "Attributes:\n" in (cls.__doc__ or ""):
        return
    lines = ["Attributes:"]
    texts = field_texts(cls)
    for field in in_order(cls):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        lines.append(f"    {field.name}: {field.type}{default}")
        lines += _wrapped(texts.get(field.name, ""))
    text = inspect.cleandoc(cls.__doc__ or "")
    section = _SECTION.search(text)
    head, tail = (text[: section.start()], text[section.start() :]) if section else (text, "")
    cls.__doc__ = "\n\n".join(filter(None, [head.rstrip(), "\n".join(lines), tail]))
