"""The records of a comparison, to train on, held out, and to score at the end, as three files that every candidate reads. Knows
records; nothing of models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaw.data.images import opened
from deltaw.data.sources import HELD_OUT, is_path, rows, splits
from deltaw.errors import DataError
from deltaw.files.atomic import write_text

NAMES = ("train", "valid", "test")
# Of the records, where there are no splits: held out, and to score at the end; and never more than so many
_SHARE, _MOST = 0.1, 1000
_ANSWERS = ("completion", "output", "label")
_Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """Where the three sets come from."""

    data: str | Path
    """A file, folder or hub data set."""
    split: str | None
    """Of `data`, to train on."""
    valid: str | None
    """Held-out records: a file, or a split of `data`. None: one of its splits, else a part of the training records."""
    test: str | None
    """Records to score, likewise."""


def file_of(folder: Path, name: str) -> Path:
    """The set's file."""
    return folder / f"{name}.jsonl"


def write(folder: Path, source: Source, *, valid_most: int, test_most: int) -> None:
    """Write the three files, unless they are there. Raises DataError for records that cannot be read, and for an empty set."""
    if all(file_of(folder, name).is_file() for name in NAMES):
        return
    for name, records in _read(source, valid_most, test_most).items():
        if not records:
            raise DataError(f"There are no records left for the {name} set of the comparison: give more of them.")
        kept = [_kept(record, folder / "images" / f"{name}-{i}.npy") for i, record in enumerate(records)]
        text = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in kept)
        write_text(file_of(folder, name), text)


def _read(source: Source, valid_most: int, test_most: int) -> dict[str, _Records]:
    there = [name for name in splits(source.data) if name in HELD_OUT]
    held_out = sorted(there, key=HELD_OUT.index)  # test comes last
    test, valid = _given(source.test, source.data), _given(source.valid, source.data)
    if test is None and held_out:
        test = _records(source.data, held_out[-1])
    if valid is None and len(held_out) > 1:
        valid = _records(source.data, held_out[0])
    train = _records(source.data, source.split)
    count = max(1, min(round(len(train) * _SHARE), _MOST))
    if test is None:
        test, train = parted(train, count, seed=0)
    if valid is None:
        valid, train = parted(train, count, seed=2)
    return {"train": train, "valid": parted(valid, valid_most, seed=3)[0], "test": parted(test, test_most, seed=1)[0]}


def _given(name: str | None, data: str | Path) -> _Records | None:
    """The records of a file or a split that was named."""
    if name is None:
        return None
    return _records(name, None) if is_path(name) else _records(data, name)


def _records(source: str | Path, split: str | None) -> _Records:
    found, problems, name = rows(source, split, None)
    if problems:
        raise DataError(f"{name}: {len(problems)} records cannot be read, the first: {problems[0]}")
    return [fields for _, fields in found]


def parted(records: Sequence[dict[str, Any]], most: int, *, seed: int) -> tuple[_Records, _Records]:
    """At most so many (but the smallest item's at least), drawn at random, and the others, both in their order. Records that
    differ in their answers alone stay together: they are references of one item, or its answer would be learned beforehand."""
    items: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        asked = {k: v for k, v in record.items() if k not in _ANSWERS}
        items.setdefault(json.dumps(asked, sort_keys=True, default=str), []).append(i)
    groups = list(items.values())
    picks: set[int] = set()
    for place in torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(picks) + len(groups[place]) <= most:
            picks.update(groups[place])
    if groups and not picks:
        smallest: list[int] = min(groups, key=len)
        picks.update(smallest)
    drawn = [record for i, record in enumerate(records) if i in picks]
    return drawn, [record for i, record in enumerate(records) if i not in picks]


def _kept(record: dict[str, Any], place: Path) -> dict[str, Any]:
    """A record as a line of JSON has it: a picture that is no file (a parquet file's bytes, an array) becomes one."""
    if record.get("image") is None or isinstance(record["image"], str):
        return record
    place.parent.mkdir(parents=True, exist_ok=True)
    np.save(place, opened(record["image"]))
    return record | {"image": str(place.resolve())}
