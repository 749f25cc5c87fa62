"""A path, hub id, list or data set → the rows of one split. Knows no form of record and no format of a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from deltaw.data.sources.files import SUFFIXES, TEXTS, Reading, advice, read_file
from deltaw.data.sources.row import Fields, Read, Row, bare, keep
from deltaw.errors import DataError, first_line, nearest, shown

if TYPE_CHECKING:
    import datasets

Source: TypeAlias = (
    "str | Path | Read | Sequence[Fields] | Mapping[str, Sequence[Fields]] | datasets.Dataset | datasets.DatasetDict"
)
"""A path or hub id, rows that are read already, a list of records, or splits of such lists by name."""

HELD_OUT = ("valid", "validation", "val", "dev", "eval", "test")
_SPLITS = ("train", "all", *HELD_OUT)
_SHARD = re.compile(r"-\d+(-of-\d+)?$")  # train-00000-of-00002.parquet, the hub's own naming


def rows(source: Source, split: str | None, default_split: str | None, how: Reading | None = None) -> Read:
    """Return the rows of one split, the problems met, and the source's name.

    `split` is asked for by the caller. `default_split` applies only where a source has splits; None is `train`.
    Raises DataError where there is nothing to read at all.
    """
    how = how or Reading()
    if isinstance(source, Read):
        _refuse_split(split, source.name)
        return source
    if isinstance(source, Mapping):  # a DatasetDict, or a plain dict of lists
        name = _pick(list(source), split or default_split, "the data set")
        return replace(_memory(source[name], name), name=name)
    if not isinstance(source, (str, Path)):
        _refuse_split(split, "records in memory")
        return replace(_memory(source, "records"), name="records in memory")
    path = local(source)
    if path is None:
        return _hub(str(source), split or default_split or "train")
    if path.is_file():
        _refuse_split(split, str(path))
        return replace(read_file(path, how), name=str(path))
    files = _folder(path)
    name = _pick(list(files), split or default_split, str(path))
    read = _together(path, name, files[name], how)
    alone = (f"{path}: its only split, {name}, is read",) * (name in HELD_OUT and not (split or default_split))
    unread = _unread(path, files, name) if split is None and default_split is None else ()
    return replace(read, notes=(*read.notes, *alone, *unread))


def _unread(folder: Path, files: Mapping[str, Sequence[Path]], name: str) -> tuple[str, ...]:
    """Return a sentence on the splits that are neither trained on nor held out, if there are any."""
    others = [file.name for split in files if split not in (name, held_out_split(folder)) for file in files[split]]
    return (f"{folder}: not read: {shown(others)}",) * bool(others)


def _together(folder: Path, split: str, files: Sequence[Path], how: Reading) -> Read:
    """Return the rows of a split's files."""
    whole = _are_documents(files)
    parts = [read_file(file, how, whole=whole) for file in files]
    notes = [note for part in parts for note in part.notes]
    notes += _of_documents(folder, files, parts) if whole else []
    return Read(
        [row for part in parts for row in part.rows],
        [line for part in parts for line in part.problems],
        tuple(notes),
        str(files[0]) if len(parts) == 1 else f"{folder} ({split})",
    )


def _of_documents(folder: Path, files: Sequence[Path], parts: Sequence[Read]) -> list[str]:
    """Return sentences on a folder of documents: how many are records, and the files that are none."""
    empty = [file.name for file, part in zip(files, parts, strict=True) if not part.rows and not part.problems]
    others = [file.name for file in _files(files[0].parent) if file.suffix.lower() not in TEXTS]
    notes = [f"{folder}: {len(files) - len(empty):,} text files, each a record"]
    notes += [f"{folder}: empty, so no records: {shown(empty)}"] * bool(empty)
    return notes + [f"{folder}: not read: {shown(others)}"] * bool(others)


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
    if not isinstance(source, (str, Path)):  # rows, or a list
        return {"train": None}
    path = local(source)
    if path is None:
        return dict.fromkeys(_hub_splits(str(source)))
    return {"train": [path]} if path.is_file() else {name: list(files) for name, files in _folder(path).items()}


def held_out_split(source: Source, split: str | None = None) -> str | None:
    """Return the split to evaluate on: the first there is of valid, validation, val, dev, eval and test; None without one.

    The `split` that is trained on is none, nor is one that stands alone, which is then trained on.
    """
    there = splits(source)
    return next((name for name in HELD_OUT if name in there and name != split and len(there) > 1), None)


def local(source: str | Path) -> Path | None:
    """Return `source` as a local path, or None if it names a hub data set.

    Raises DataError for what looks local but is not there.
    """
    path = Path(source).expanduser()
    if path.exists():
        if path.is_file() and path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: {advice(path)}")
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
    if wanted is None and len(names) == 1:
        return names[0]
    wanted = wanted or "train"
    if wanted not in names:
        near = nearest(wanted, names)
        raise DataError(
            f"{source} has no split {wanted!r}{near}. Its splits: {', '.join(names)}. Choose one with --split, or name the data "
            "train."
        )
    return wanted


def _folder(folder: Path) -> dict[str, list[Path]]:
    """Return split name → files of a folder (or of its `data/`), shards in order. Two formats of one split are ambiguous.

    Text files count where there are no others: a README beside data is none. If they are named for no split, they are documents.
    """
    there = [_files(place) for place in (folder, folder / "data")]
    records = [[p for p in files if p.suffix.lower() in SUFFIXES and p.suffix.lower() not in TEXTS] for files in there]
    texts = [[p for p in files if p.suffix.lower() in TEXTS] for files in there]
    files = next(filter(None, [*records, *texts]), [])
    _check_unread(folder, [file for files in there for file in files])
    files = [file for file in files if file.name != "dataset_info.json"]
    if not files:
        inner = sorted(place.name for place in folder.glob("*/") if _files(place))
        where = f" Its folders {shown(inner)} have files: name one of these, or a file." if inner else ""
        raise DataError(
            f"{folder}: no data files; expected train.jsonl, valid.jsonl or the like ({', '.join(SUFFIXES)}).{where}"
        )
    if _are_documents(files):
        return {"train": files}
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    unclear = [
        f"split {name!r}: {', '.join(p.name for p in group)}"
        for name, group in by_split.items()
        if len({p.suffix for p in group}) > 1 or (len(group) > 1 and any(not _SHARD.search(p.stem) for p in group))
    ]
    if unclear:
        raise DataError(f"{folder}: several files claim one split. Keep one of each, or name a file:", unclear)
    if "train" not in by_split and "all" in by_split:
        by_split = {"train": by_split.pop("all"), **by_split}
    return by_split


def _are_documents(files: Sequence[Path]) -> bool:
    """Return whether these are text files that are each a document of its own: none is named for a split."""
    splits_named = {*_SPLITS} & {_split_of(file) for file in files}
    return not splits_named and all(file.suffix.lower() in TEXTS for file in files)


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder in their order, without hidden ones."""
    return sorted(p for p in folder.glob("*") if p.is_file() and not p.name.startswith("."))


def _split_of(file: Path) -> str:
    """Return the name of the split that a file holds. The names that mean something are read in any capitals."""
    name = _SHARD.sub("", file.stem)
    return name.lower() if name.lower() in _SPLITS else name


def _check_unread(folder: Path, files: Sequence[Path]) -> None:
    """Raise DataError for files that hold a split in a format that is not read: training would go on without it."""
    names = {file.name for file in files}
    # LLaMA-Factory has a dataset_info.json of its own
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        raise DataError(
            f"{folder}: a data set that datasets.save_to_disk wrote. Write its splits with to_parquet, or in Python give "
            "what datasets.load_from_disk returns."
        )
    unread = [f for f in files if f.suffix.lower() not in SUFFIXES and f.name.lower().partition(".")[0] in _SPLITS]
    if unread:
        raise DataError(f"{folder}: files of its splits cannot be read:", [f"{f.name}: {advice(f)}" for f in unread])


def _memory(source: Iterable[object], name: str) -> Read:
    rows: list[Row] = []
    problems: list[str] = []
    if isinstance(source, (bytes, bytearray)) or not hasattr(source, "__getitem__"):
        raise DataError(f"{type(source).__name__} is no data source. Give a path, hub id, list of dicts or Dataset.")
    of_table = hasattr(source, "features")  # a data set of the library datasets, which keeps Arrow tables
    for i, value in enumerate(source):
        if of_table and isinstance(value, dict):
            value = {field: bare(part) for field, part in value.items()}
        keep(f"{name}[{i}]", value, rows, problems)
    return Read(rows, problems)


def _hub(name: str, split: str) -> Read:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library and its network layers raise dozens of types
        raise DataError(
            f"{name!r} is not a local file or folder, and the hub data set could not be loaded (split {split!r}): "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return replace(_memory(data, f"{name}/{split}"), name=f"{name} ({split})")


def _hub_splits(name: str) -> list[str]:
    import datasets

    try:
        return list(datasets.get_dataset_split_names(name))
    except Exception as error:  # as above
        raise DataError(
            f"{name!r} is not a local file or folder, and the hub does not list its splits: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
