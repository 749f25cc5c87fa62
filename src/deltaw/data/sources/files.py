"""One file → rows, by its ending and its encoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltaw.data.sources.json_text import json_array, json_lines
from deltaw.data.sources.row import Fields, Read, line_of
from deltaw.data.sources.tables import parquet, table
from deltaw.data.sources.texts import document, markdown, paragraphs
from deltaw.errors import DataError

TEXTS = (".txt", ".md")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *TEXTS)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Reading:
    """The way that files are read."""

    encoding: str = "utf-8"
    """The encoding of files of text; parquet has its own."""
    picture: str = "image"
    """The field whose pictures may lie beside the file."""


def read_file(path: Path, how: Reading, *, whole: bool = False) -> Read:
    """Return the rows of a file. `whole`: a text file is one record.

    Raises DataError where the file cannot be read at all.
    """
    read = _parsed(path, how, whole)
    return Read([(place, _with_picture(fields, how.picture, path.parent)) for place, fields in read.rows],
                read.problems, read.notes)  # fmt: skip


def _with_picture(fields: Fields, name: str, folder: Path) -> Fields:
    """Return the fields with the whole path of a picture that lies beside the file that names it."""
    image = fields.get(name)
    if isinstance(image, str) and _is_file(folder / image):
        return {**fields, name: str((folder / image).absolute())}
    return fields


def _is_file(path: Path) -> bool:
    """Return whether there is a file; none has a name that the system cannot take."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _parsed(path: Path, how: Reading, whole: bool) -> Read:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return parquet(path)
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    try:
        raw = _as_utf8(raw, how.encoding)
    except UnicodeError as error:
        return Read([], [_not_in(how.encoding, raw, error, path.name)])
    if suffix in (".csv", ".tsv"):
        return table(raw, path.name)
    if suffix in TEXTS:
        return (document if whole else markdown if suffix == ".md" else paragraphs)(raw, path.name)
    if suffix == ".json" and raw.lstrip()[:1] == b"[":
        return json_array(raw, path.name)
    return json_lines(raw, path.name)


def _as_utf8(raw: bytes, encoding: str) -> bytes:
    """Return bytes of a declared encoding as UTF-8, without a BOM. The readers say which lines of UTF-8 are none."""
    if encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "utf-8-sig"):
        raw = raw.decode(encoding).encode("utf-8")
    return raw.removeprefix(_BOM)


def _not_in(encoding: str, raw: bytes, error: UnicodeError, name: str) -> str:
    """Return what is wrong with bytes that are not of the declared encoding."""
    if not isinstance(error, UnicodeDecodeError):  # UTF-16 without a BOM
        return f"{name}:1: not {encoding}: {error}. Name the encoding that it has with --encoding."
    line, byte = line_of(raw, error.start), raw[error.start]
    return f"{name}:{line}: not {encoding}: byte 0x{byte:02x}, {error.reason}. Name the encoding that it has with --encoding."
