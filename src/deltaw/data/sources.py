"""Raw rows of files, folders of splits, hub data sets and lists. Knows no form of record and no tokenizer.

Every reader returns `(rows, problems)`: rows are `(place, {field: value})`, problems are finished lines of text.
Only blank lines are skipped. A reader continues after a bad line, so that one run shows every one of them.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from deltaw.errors import DataError, first_line, nearest
from deltaw.files.formats.strict_json import DECODER, check_depth

if TYPE_CHECKING:
    import datasets
    import pyarrow

Fields = Mapping[str, object]
"""A row's values by their fields."""
Row = tuple[str, Fields]
"""A row's place, for messages, and its fields."""
Read = tuple[list[Row], list[str]]
Source: TypeAlias = (
    "str | Path | Sequence[Fields] | Mapping[str, Sequence[Fields]] | datasets.Dataset | datasets.DatasetDict"
)
"""A path or hub id, a list of records, or splits of such lists by name."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HELD_OUT = ("valid", "validation", "val", "dev", "eval", "test")
_SHARD = re.compile(r"-\d+(-of-\d+)?$")  # train-00000-of-00002.parquet, the hub's own naming
_BOM = b"\xef\xbb\xbf"


def rows(source: Source, split: str | None, default_split: str | None) -> tuple[list[Row], list[str], str]:
    """Return the rows of one split, the problems met, and the source's name.

    `split` is asked for by the caller. `default_split` applies only where a source has splits; None is `train`.
    Raises DataError where there is nothing to read at all.
    """
    if isinstance(source, Mapping):  # a DatasetDict, or a plain dict of lists
        name = _pick(list(source), split or default_split, "the data set")
        return (*_memory(source[name], name), name)
    if not isinstance(source, (str, Path)):
        _refuse_split(split, "records in memory")
        return (*_memory(source, "records"), "records in memory")
    path = local(source)
    if path is None:
        return _hub(str(source), split or default_split or "train")
    if path.is_file():
        _refuse_split(split, str(path))
        return (*_file(path), str(path))
    files = _folder(path)
    name = _pick(list(files), split or default_split, str(path))
    parts = [_file(file) for file in files[name]]
    label = str(files[name][0]) if len(parts) == 1 else f"{path} ({name})"
    return [row for part in parts for row in part[0]], [line for part in parts for line in part[1]], label


def is_path(name: str) -> bool:
    """Return whether held-out records are named by a file or folder, not by a split of the data.

    What looks like a path is no split.
    """
    path = Path(name)
    return path.exists() or bool(path.suffix) or len(path.parts) > 1


def splits(source: Source) -> dict[str, list[Path] | None]:
    """Return split name → its files, None where they are not local. A single file or list is one `train`."""
    if isinstance(source, Mapping):
        return dict.fromkeys(source)
    if not isinstance(source, (str, Path)):
        return {"train": None}
    path = local(source)
    if path is None:
        return dict.fromkeys(_hub_splits(str(source)))
    return {"train": [path]} if path.is_file() else {name: list(files) for name, files in _folder(path).items()}


def held_out_split(source: Source) -> str | None:
    """Return the split to evaluate on: the first there is of valid, validation, val, dev, eval and test; None without one."""
    there = splits(source)
    return next((name for name in HELD_OUT if name in there), None)


def local(source: str | Path) -> Path | None:
    """Return `source` as a local path, or None if it names a hub data set.

    Raises DataError for what looks local but is not there.
    """
    path = Path(source).expanduser()
    if path.exists():
        if path.is_file() and path.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"{path}: cannot tell the format from the ending {path.suffix!r}; use one of {', '.join(SUFFIXES)}."
            )
        return path
    text = str(source)
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith(".") and path.suffix not in SUFFIXES
    if isinstance(source, Path) or not is_id:
        folder = path.parent
        there = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        hint = nearest(path.name, there) if there else f"; the folder {folder} is not there either"
        raise DataError(f"{path}: no such file or folder{hint}. Give a data file, a folder of splits, or a hub id.")
    return None


def _refuse_split(split: str | None, name: str) -> None:
    if split not in (None, "train"):
        raise DataError(f"{name} has no splits, so no split {split!r}. Give held-out records as a file of their own.")


def _pick(names: list[str], wanted: str | None, source: str) -> str:
    if wanted is None and "train" not in names and len(names) == 1:
        return names[0]
    wanted = wanted or "train"
    if wanted not in names:
        raise DataError(f"{source} has no split {wanted!r}{nearest(wanted, names)}. Its splits: {', '.join(names)}.")
    return wanted


def _folder(folder: Path) -> dict[str, list[Path]]:
    """Return split name → files of a folder (or of its `data/`), shards in order. Two formats of one split are ambiguous."""
    for place in (folder, folder / "data"):
        files = sorted(p for p in place.glob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
        if files:
            break
    else:
        raise DataError(
            f"{folder}: no data files; expected train.jsonl, valid.jsonl or the like ({', '.join(SUFFIXES)})."
        )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_SHARD.sub("", file.stem), []).append(file)
    unclear = [
        f"split {name!r}: {', '.join(p.name for p in group)}"
        for name, group in by_split.items()
        if len({p.suffix for p in group}) > 1 or (len(group) > 1 and any(p.stem == name for p in group))
    ]
    if unclear:
        raise DataError(f"{folder}: several files claim one split. Keep one of each, or name a file:", unclear)
    if "train" not in by_split and "all" in by_split:
        by_split = {"train": by_split.pop("all"), **by_split}
    return by_split


def _file(path: Path) -> Read:
    read, problems = _parsed(path)
    return [(place, _with_picture(fields, path.parent)) for place, fields in read], problems


def _with_picture(fields: Fields, folder: Path) -> Fields:
    """Return the fields with the whole path of a picture that lies beside the file that names it."""
    image = fields.get("image")
    if isinstance(image, str) and _is_file(folder / image):
        return {**fields, "image": str((folder / image).absolute())}
    return fields


def _is_file(path: Path) -> bool:
    """Return whether there is a file; none has a name that the system cannot take."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _parsed(path: Path) -> Read:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return _parquet(path)
        raw = path.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if suffix == ".csv":
        return _csv(raw, path.name)
    if suffix == ".json" and raw.lstrip()[:1] == b"[":
        return _json_array(raw, path.name)
    return _json_lines(raw, path.name)


def _json_lines(raw: bytes, name: str) -> Read:
    """Read one object a line. Lines end at \\n alone: U+2028 and its like are ordinary characters inside JSON strings."""
    read: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            value = DECODER.decode(line.decode("utf-8"))
            check_depth(value)
        except UnicodeDecodeError as error:
            problems.append(f"{place}: {_not_utf8(error)}")
        except (ValueError, RecursionError) as error:
            problems.append(f"{place}: {_not_json(error)}")
        else:
            _keep(place, value, read, problems)
    return read, problems


def _json_array(raw: bytes, name: str) -> Read:
    """Read an array of objects one by one, so that each keeps the line it starts on."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return [], [f"{name}:{_line(raw, error.start)}: {_not_utf8(error)}"]
    space = re.compile(r"[ \t\r\n]*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]  # the pattern matches anywhere

    read: list[Row] = []
    problems: list[str] = []
    at, line, counted = skip(skip(0) + 1), 1, 0
    if text[at : at + 1] == "]":
        return [], []
    while True:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = DECODER.raw_decode(text, at)
            check_depth(value)
        except json.JSONDecodeError as error:
            return read, [*problems, f"{name}:{error.lineno}: {_not_json(error)}"]
        except (ValueError, RecursionError) as error:
            return read, [*problems, f"{name}:{line}: {_not_json(error)}"]
        _keep(f"{name}:{line}", value, read, problems)
        at = skip(at)
        mark, after = text[at : at + 1], skip(at + 1)
        if mark == "]" and after == len(text):
            return read, problems
        if mark != ",":
            end = f"{name}:{_line(text, at)}"
            what = "the file ends inside the array" if not mark else f"expected ',' or the final ']', found {mark!r}"
            return read, [*problems, f"{end}: not JSON: {what}. Is the file cut off?"]
        at = after


def _csv(raw: bytes, name: str) -> Read:
    """Read a header, then rows. A place is the line on which the row starts, as quoted cells may span lines."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return [], [f"{name}:{_line(raw, error.start)}: {_not_utf8(error)}"]
    read: list[Row] = []
    problems: list[str] = []
    header: list[str] | None = None
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    start = 1
    try:
        for cells in reader:
            place, start = f"{name}:{start}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                other = next((mark for mark in (";", "\t", "|") if len(cells) == 1 and mark in cells[0]), None)
                if other:
                    return [], [f"{place}: the columns are divided by {other!r}; divide them by commas"]
                twice = [c for c in dict.fromkeys(cells) if cells.count(c) > 1]
                if twice:
                    return [], [f"{place}: column {c!r} is there more than once; rename one" for c in twice]
            elif len(cells) != len(header):
                problems.append(
                    f"{place}: {len(cells)} cells under {len(header)} columns ({', '.join(header)}). "
                    "Put cells that contain commas or line breaks in double quotes."
                )
            else:
                read.append((place, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        problems.append(f"{name}:{start}: not CSV: {error}. Is a double quote missing in the row that starts here?")
    finally:
        csv.field_size_limit(limit)
    return read, problems


def _parquet(path: Path) -> Read:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:  # for damaged bytes the library and its metadata's readers raise dozens of types
        raise DataError(f"{path}: not a readable parquet file: {first_line(error)}") from error
    if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
        return [], [f"{path.name}: column {name!r} is there more than once; rename one" for name in twice]
    try:
        return [(f"{path.name}[{i}]", row) for i, row in enumerate(table.to_pylist())], []
    except (pyarrow.ArrowException, ValueError, OverflowError):  # bytes that are no UTF-8, a date that Python has not
        return _by_rows(table, path.name)


def _by_rows(table: pyarrow.Table, name: str) -> Read:
    """Return the rows of a table one by one, and those that have a value which Python cannot hold as problems."""
    import pyarrow

    read: list[Row] = []
    problems: list[str] = []
    for i in range(len(table)):
        try:
            read.append((f"{name}[{i}]", table.slice(i, 1).to_pylist()[0]))
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            problems.append(f"{name}[{i}]: a value cannot be read: {first_line(error)}")
    return read, problems


def _memory(source: Iterable[object], name: str) -> Read:
    read: list[Row] = []
    problems: list[str] = []
    if isinstance(source, (bytes, bytearray)) or not hasattr(source, "__getitem__"):
        raise DataError(f"{type(source).__name__} is no data source. Give a path, hub id, list of dicts or Dataset.")
    for i, value in enumerate(source):
        _keep(f"{name}[{i}]", value, read, problems)
    return read, problems


def _hub(name: str, split: str) -> tuple[list[Row], list[str], str]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library and its network layers raise dozens of types
        raise DataError(
            f"{name!r} is not a local file or folder, and the hub data set could not be loaded (split {split!r}): "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return (*_memory(data, f"{name}/{split}"), f"{name} ({split})")


def _hub_splits(name: str) -> list[str]:
    import datasets

    try:
        return list(datasets.get_dataset_split_names(name))
    except Exception as error:  # as above
        raise DataError(
            f"{name!r} is not a local file or folder, and the hub does not list its splits: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _keep(place: str, value: object, read: list[Row], problems: list[str]) -> None:
    if isinstance(value, dict):
        read.append((place, value))
    else:
        problems.append(f"{place}: a record must be an object with named fields, found {show(value)}")


def _line(text: str | bytes, at: int) -> int:
    """Return the 1-based line of an offset."""
    lines = text.count("\n", 0, at) if isinstance(text, str) else text.count(b"\n", 0, at)
    return lines + 1


def show(value: object) -> str:
    """Return a value for a message: its type and its first characters."""
    if value is None:
        return "null"
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, lists within lists
        return type(value).__name__
    short = repr(text[:40] + "…" if len(text) > 40 else text) if isinstance(value, str) else text[:40]
    return f"{type(value).__name__} {short}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte, column = error.object[error.start], error.start - error.object.rfind(b"\n", 0, error.start)
    if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "the file is UTF-16. Save it as UTF-8."
    return f"not UTF-8: byte 0x{byte:02x} at byte {column} of the line. Save the file as UTF-8."


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        short = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        cut = " The line is cut off or spread over lines" if short else ""
        hint = f"{cut}; a record is one whole object." if cut else ""
        return f"not JSON: {error.msg} at column {error.colno}.{hint}"
    return f"not JSON that can be read: {first_line(error)}"
