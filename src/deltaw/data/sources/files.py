"""One file → rows, by its ending and its encoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltaw.data.sources.json_text import json_text
from deltaw.data.sources.row import Fields, Read, line_of
from deltaw.data.sources.tables import parquet, table
from deltaw.data.sources.texts import document, markdown, paragraphs
from deltaw.errors import DataError

TEXTS = (".txt", ".md")
_LINES = (".jsonl", ".ndjson", ".jsonlines")
SUFFIXES = (*_LINES, ".json", ".csv", ".tsv", ".parquet", *TEXTS)
_ADVICE = {
    **dict.fromkeys((".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz"), "unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save the sheet as CSV (UTF-8)"),
    **dict.fromkeys((".arrow", ".feather"), "write the table as parquet"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy", ".npz"), "write the records as JSON Lines"),
    **dict.fromkeys((".pdf", ".docx", ".html"), "save its text as .txt or .md"),
}
"""Ending of a file that is not read → what to do."""
_MAGIC = {
    b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\x00": ".xz", b"BZh": ".bz2", b"PK\x03\x04": ".zip",
    b"\xd0\xcf\x11\xe0": ".xls", b"ARROW1": ".arrow", b"%PDF-": ".pdf", b"PAR1": ".parquet",
}  # fmt: skip
"""First bytes of a file → the ending that it should have."""
_BOM = b"\xef\xbb\xbf"
_LOOKED_AT = 400  # bytes at the start by which UTF-16 is told


@dataclass(frozen=True)
class Reading:
    """The way that files are read."""

    encoding: str = "utf-8"
    """The encoding of files of text; parquet has its own."""
    picture: str = "image"
    """The field whose pictures may lie beside the file."""


def advice(path: Path) -> str:
    """Return what to do with a file whose ending is none that is read."""
    if path.suffix.lower() in _ADVICE:
        return f"{path.suffix} files are not read: {_ADVICE[path.suffix.lower()]}."
    return f"cannot tell the format from the ending {path.suffix!r}; use one of {', '.join(SUFFIXES)}."


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
    _check_bytes(raw, path, how.encoding)
    try:
        raw = _as_utf8(raw, how.encoding)
    except UnicodeError as error:
        return Read([], [_not_in(how.encoding, raw, error, path.name)])
    if suffix in (".csv", ".tsv"):
        return table(raw, path.name)
    if suffix in TEXTS:
        return (document if whole else markdown if suffix == ".md" else paragraphs)(raw, path.name)
    return json_text(raw, path.name)


def _check_bytes(raw: bytes, path: Path, encoding: str) -> None:
    """Raise DataError for a file that is no text, or UTF-16 without a mark of it."""
    ending = next((ending for magic, ending in _MAGIC.items() if raw.startswith(magic)), None)
    if ending is not None:
        what = _ADVICE.get(ending, f"name it {path.stem}{ending}")
        what += ", or save the sheet as CSV (UTF-8) if it is an Excel workbook" if ending == ".zip" else ""
        raise DataError(f"{path}: by its first bytes it is a {ending} file, and no {path.suffix}: {what}.")
    first = b"" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else raw[:_LOOKED_AT]  # readers say what these marks mean
    for end, start in (("le", 1), ("be", 0)):
        if (
            _is_utf8(encoding)
            and len(first) > 1
            and first[start::2].count(0) > len(first) / 4 > first[1 - start :: 2].count(0)
        ):
            raise DataError(f"{path}: it looks like UTF-16. Save it as UTF-8, or read it with --encoding utf-16-{end}.")


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")


def _as_utf8(raw: bytes, encoding: str) -> bytes:
    """Return bytes of a declared encoding as UTF-8, without a BOM. The readers say which lines of UTF-8 are none."""
    if not _is_utf8(encoding):
        raw = raw.decode(encoding).encode("utf-8")
    return raw.removeprefix(_BOM)


def _not_in(encoding: str, raw: bytes, error: UnicodeError, name: str) -> str:
    """Return what is wrong with bytes that are not of the declared encoding."""
    if not isinstance(error, UnicodeDecodeError):  # UTF-16 without a BOM
        return f"{name}:1: not {encoding}: {error}. Name the encoding that it has with --encoding."
    line, byte = line_of(raw, error.start), raw[error.start]
    return f"{name}:{line}: not {encoding}: byte 0x{byte:02x}, {error.reason}. Name the encoding that it has with --encoding."
