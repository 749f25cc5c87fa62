"""Help as tyro shows it, in our words: placeholders for values, defaults worth a word, lines folded between words."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import operator
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, TextIO

from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from deltaw.cli.flags import CHOICES
from deltaw.errors import visible

_BY_NAME = {
    "adapter": "FOLDER", "base": "FOLDER", "out": "PATH", "config": "FILE", "file": "FILE", "valid": "FILE|SPLIT",
    "test": "FILE|SPLIT", "records": "FILE|SPLIT", "model": "MODEL", "data": "DATA", "memory": "SIZE", "bytes": "SIZE",
    "device": "DEVICE", "labels": "NAME [NAME …]",
}  # fmt: skip
_BY_TYPE: dict[object, str] = {str: "TEXT", int: "N", float: "NUMBER"}

_TITLES = {"settings": "method", "run": "training", "opening": "model", "records": "data"}
"""Field with settings of its own → the title of their flags."""

registry = ConstructorRegistry()
"""tyro's rules with ours: open it (`with registry:`) around a call of tyro."""

_under_way: set[type] = set()


@registry.struct_rule
def _settings(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass as tyro takes it, each field with our words for its value and its default."""
    if not dataclasses.is_dataclass(info.type) or info.type in _under_way:
        return None
    _under_way.add(info.type)  # asked again, we leave it to tyro's rule
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _under_way.discard(info.type)
    if not isinstance(spec, StructConstructorSpec):
        return None
    fields = tuple(_in_our_words(field, CHOICES.get((info.type, field.name), ())) for field in spec.fields)
    return dataclasses.replace(spec, fields=fields)


def _in_our_words(field: StructFieldSpec, choices: Iterable[str]) -> StructFieldSpec:
    """The field with its words; its text ends in `choices`."""
    hint, *others = typing.get_args(field.type) if hasattr(field.type, "__metadata__") else (field.type,)
    if dataclasses.is_dataclass(hint):
        title = arg(name=_TITLES.get(field.name, field.name), prefix_name=False)
        return dataclasses.replace(field, type=_annotated(hint, title, *others))
    kind = typing.get_args(hint)[0] if typing.get_origin(hint) in (typing.Union, types.UnionType) else hint
    metavar = _BY_TYPE.get(kind)
    if kind is str or typing.get_origin(kind) is list:
        metavar = _BY_NAME.get(field.name, metavar)
    shown = arg(metavar=metavar, help_behavior_hint=_default(field.default))
    typed = _annotated(hint, shown, *others)  # the field's settings come last, and win
    return dataclasses.replace(field, type=typed, helptext=functools.partial(_one_paragraph, field.helptext, choices))


def _annotated(hint: object, *metadata: object) -> type:
    return typing.cast(type, operator.getitem(Annotated, (hint, *metadata)))


def _one_paragraph(text: str | Callable[[], str | None] | None, choices: Iterable[str]) -> str:
    """A field's text without the line breaks of our source, some of which tyro keeps."""
    words = ((text() if callable(text) else text) or "").split()
    return " ".join(words) + (f" {', '.join(choices)}." if choices else "")


def _default(value: object) -> str:
    """The default in brackets. None where it is a flag that is off, nothing, or in the flag's text."""
    if value is None or value is False or value == "":
        return ""
    return f"(default: {'yes' if value is True else value})"


@contextlib.contextmanager
def folded_help() -> Iterator[None]:
    """Fold the lines between words where tyro would print help lines that are longer than the terminal."""
    printed, complaints = _Terminal(sys.stdout), _Terminal(sys.stderr)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
            yield
    finally:
        sys.stderr.write(visible(complaints.getvalue(), coloured=True))  # it quotes the arguments
        width = shutil.get_terminal_size().columns
        for line in visible(printed.getvalue(), coloured=True).splitlines():
            line = re.sub(r"\{[a-z]+(,[a-z]+){9,}\}", "COMMAND", line)
            narrow = len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= width
            print(line if narrow else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False))


class _Terminal(io.StringIO):
    """Text for `stream`: tyro colours it and draws boxes as the stream takes them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return self.stream.encoding

    def isatty(self) -> bool:
        """True if the stream is a terminal."""
        return self.stream.isatty()
