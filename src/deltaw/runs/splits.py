"""The three sets of records of a study, which every candidate reads: to train on, held out, and to score at the end. Knows
records; nothing of models."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deltaw.config import DataConfig
from deltaw.data.hold_out import hold_out, sample
from deltaw.data.images import opened
from deltaw.data.prompts import described, items_in
from deltaw.data.records import Records, checked, notes_of
from deltaw.data.sources import HELD_OUT, is_path, splits
from deltaw.errors import DataError
from deltaw.files.formats.atomic import replacing, write_text
from deltaw.runs.folder import read_json

NAMES = ("train", "valid", "test")
# Without splits, the share of the records to hold out, and likewise to score; and the most of each
_SHARE, _MOST = 0.1, 1000
_NOTES = "notes.json"
_INSTEAD = "Give held-out records with --valid, and test records with --test."


@dataclass(frozen=True)
class Source:
    """The origin of the three sets."""

    data: str | Path
    """A file, folder or hub data set."""
    split: str | None
    """The split of `data` to train on."""
    valid: str | None
    """Held-out records: a file, or a split of `data`. None: one of its splits, else a part of the training records."""
    test: str | None
    """Records to score at the end: the same."""


def file_of(folder: Path, name: str) -> Path:
    """Return the file of one of NAMES."""
    return folder / f"{name}.jsonl"


@dataclass(frozen=True)
class Set:
    """Records with the fields that make them."""

    records: Records
    fields: list[Mapping[str, object]]
    """Under the names that forms know."""

    def __len__(self) -> int:
        return len(self.fields)

    def only(self, numbers: Collection[int]) -> Set:
        """Return some of them by number, in their order."""
        kept = sorted(numbers)
        return Set(self.records.only(kept), [self.fields[i] for i in kept])


@dataclass(frozen=True)
class Sets:
    """The three sets, and how their sources were read."""

    parts: Mapping[str, Set]
    """One of NAMES → its set."""
    notes: tuple[str, ...]
    """Sentences, also on fields that are not used."""


def as_written(data: DataConfig) -> DataConfig:
    """Return the settings by which the files of the sets are read: their fields have the names that forms know."""
    return replace(data, columns="", encoding="utf-8")


def read(source: Source, data: DataConfig, valid_most: int, test_most: int) -> Sets:
    """Return the three sets. All records of a prompt are in the same one.

    data: how records are read. valid_most, test_most: the most records of these sets, a seeded sample of all. Raises DataError
    for records that cannot be used, and for too few prompts to make three sets, or an interval, of them.
    """
    held_out = sorted((name for name in splits(source.data) if name in HELD_OUT), key=HELD_OUT.index)  # test comes last
    test, valid = (_named(name, source.data, data) for name in (source.test, source.valid))
    if test is None and held_out:
        test = _records(source.data, held_out[-1], data)
    if valid is None and len(held_out) > 1:
        valid = _records(source.data, held_out[0], data)
    train = _records(source.data, source.split, data)
    notes = notes_of(part.records for part in (train, valid, test) if part is not None)
    share = min(round(len(train) * _SHARE), _MOST)
    if test is None:
        test, train = _cut_for_test(train, max(2, share))
    if valid is None:
        valid, train = _cut(train, max(1, share), seed=2)
    test = _sampled(test, test_most, seed=1)
    if len(items_in(test.records.items)) < 2:
        raise DataError(
            f"The test set has {described(test.records.items)}, and an interval needs two at least: give more records, or others "
            "with --test."
        )
    return Sets({"train": train, "valid": _sampled(valid, valid_most, seed=3), "test": test}, notes)


def write(folder: Path, sets: Sets) -> None:
    """Write a file for each set, and how their sources were read."""
    write_text(folder / _NOTES, json.dumps({"notes": sets.notes}, ensure_ascii=False) + "\n")
    for name, part in sets.parts.items():
        kept = [_kept(fields, folder / "images" / f"{name}-{i}.npy") for i, fields in enumerate(part.fields)]
        text = "".join(json.dumps(fields, ensure_ascii=False, default=str) + "\n" for fields in kept)
        write_text(file_of(folder, name), text)


def notes(folder: Path) -> tuple[str, ...]:
    """Return how the sources of the sets in a folder were read; nothing where a version of before wrote them."""
    return tuple((read_json(folder / _NOTES) or {}).get("notes", ()))


def _named(name: str | None, source: str | Path, data: DataConfig) -> Set | None:
    """Return the records of a file or a split by its name; None without one."""
    if name is None:
        return None
    return _records(name, None, data) if is_path(name) else _records(source, name, data)


def _records(source: str | Path, split: str | None, data: DataConfig) -> Set:
    records, fields = checked(source, replace(data, split=None), split=split)
    return Set(records, fields)


def _cut(part: Set, count: int, *, seed: int) -> tuple[Set, Set]:
    """Return about `count` records, in whole prompts, and the others."""
    records = part.records
    held = hold_out(records.items, count, most=_MOST, seed=seed, source=records.source, instead=_INSTEAD)
    return part.only(held), part.only(set(range(len(part))) - set(held))


def _cut_for_test(train: Set, count: int) -> tuple[Set, Set]:
    """Return about `count` records and the others. Of a single prompt there is no interval, so another one is added then."""
    test, others = _cut(train, count, seed=0)
    if len(items_in(test.records.items)) > 1:
        return test, others
    more, others = _cut(others, 1, seed=0)
    records = test.records.only(range(len(test)))
    records.items.extend(more.records.items)
    return Set(records, [*test.fields, *more.fields]), others


def _sampled(part: Set, most: int, *, seed: int) -> Set:
    return part.only(sample(part.records.items, most, seed=seed))


def _kept(record: Mapping[str, object], place: Path) -> Mapping[str, object]:
    """Return a record for a line of JSON. An image that is no file (a parquet file's bytes, an array) is written as `place`."""
    if record.get("image") is None or isinstance(record["image"], str):
        return record
    with replacing(place) as new, new.open("wb") as file:
        np.save(file, opened(record["image"]))
    return {**record, "image": str(place.resolve())}
