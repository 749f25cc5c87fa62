"""Safetensors checkpoints as they lie on disk: headers, byte ranges, and one tensor at a time in memory. No model code.

The format (safetensors' own specification): eight bytes with the length of a JSON header, the header, and the tensors' bytes
without gaps. A checkpoint is one such file, or several and an index that says which tensor is in which.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from deltaw.errors import FileError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# Bytes that are copied at once
PIECE = 1 << 24
# The specification's own bound of a header
_LONGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """Where one tensor is in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """From the beginning of the file, in bytes."""
    size: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file by its header."""

    path: Path
    header: bytes
    """With its length in front: all that stands before the tensors."""
    entries: dict[str, Entry]
    """Tensor name → entry, in the order of their bytes."""
    metadata: dict[str, str]


def shards_of(folder: Path) -> list[Shard]:
    """The shards of the checkpoint in `folder`. Raises FileError with everything wrong: no safetensors, a shard that is missing
    or damaged, an index that names other tensors than the shards hold."""
    if not (folder / INDEX).is_file():
        if not folder.is_dir():
            raise FileError(f"There is no folder {folder}.")
        if not (folder / SINGLE).is_file():
            raise FileError(f"{folder} holds no safetensors checkpoint: neither {SINGLE} nor {INDEX} is in it.")
        return [read_header(folder / SINGLE)]
    placed = _index(folder / INDEX)
    problems: list[str] = []
    shards: list[Shard] = []
    for name in dict.fromkeys(placed.values()):
        try:
            shards.append(read_header(folder / name))
        except FileError as error:
            problems.append(str(error))
    found = {tensor: shard.path.name for shard in shards for tensor in shard.entries}
    if not problems:
        problems += [f"{INDEX} places {t} in {f}, which lacks it" for t, f in placed.items() if found.get(t) != f]
        problems += [f"{f} holds {t}, which {INDEX} does not name" for t, f in found.items() if t not in placed]
    if problems:
        raise FileError(f"The checkpoint in {folder} cannot be used:", problems)
    return shards


def _index(path: Path) -> dict[str, str]:
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        sound = all(isinstance(name, str) and Path(name).name == name for name in placed.values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise FileError(f"{path} cannot be read as an index of shards: {error!r}") from error
    if not sound:
        raise FileError(f"{path} names shards outside its folder.")
    return placed


def read_header(path: Path) -> Shard:
    """The header of one safetensors file, checked against the file's size. Raises FileError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            whole = path.stat().st_size
            if not 0 < length <= min(whole - 8, _LONGEST_HEADER):
                raise ValueError(f"its header would have {length:,} bytes, the file has {whole:,}")
            text = file.read(length)
        header = json.loads(text)
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no mapping of texts")
        return Shard(path, length.to_bytes(8, "little") + text, _entries(header, 8 + length, whole), metadata)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is no sound safetensors file: {error}") from error


def _entries(header: Mapping[str, Any], begin: int, whole: int) -> dict[str, Entry]:
    """The header's entries in the order of their bytes. Raises ValueError where they do not fill the file exactly."""
    entries = {}
    for name, values in header.items():
        if name != "__metadata__":
            start, end = values["data_offsets"]
            entries[name] = Entry(values["dtype"], tuple(values["shape"]), begin + start, end - start)
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)))
    at = begin
    for name, entry in ordered.items():
        dtype = DTYPES.get(entry.dtype)
        if entry.start != at or entry.size < 0:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        if dtype is not None and math.prod(entry.shape) * dtype.itemsize != entry.size:
            raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)} but has {entry.size:,} bytes")
        at += entry.size
    if at != whole:
        raise ValueError(f"its tensors end at byte {at:,}, the file has {whole:,}")
    return ordered


def read_tensor(file: BinaryIO, entry: Entry) -> tuple[bytearray, Tensor]:
    """One tensor's bytes, and the tensor that they are the memory of. Raises FileError for a dtype that is not known."""
    if entry.dtype not in DTYPES:
        raise FileError(f"dtype {entry.dtype} is not known")
    held = bytearray(entry.size)
    file.seek(entry.start)
    if file.readinto(held) != entry.size:  # type: ignore[attr-defined]
        raise FileError("the file ends within a tensor")
    return held, tensor_over(held, DTYPES[entry.dtype]).view(entry.shape)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one file, in the order of their bytes, and the header's metadata. The file is read once, into one
    buffer that the tensors are views of. Raises FileError."""
    shard = read_header(path)
    unknown = [f"{name} is {entry.dtype}" for name, entry in shard.entries.items() if entry.dtype not in DTYPES]
    if unknown:
        raise FileError(f"{path} has tensors of a dtype that is not known:", unknown)
    begin = len(shard.header)
    size = path.stat().st_size - begin
    # Pages of its own, which go back to the system with the last tensor: the C library would keep them for itself. Not the
    # file's own pages: whoever writes to it would change the tensors, or kill the process
    memory = _pages(max(size, 1))  # the system gives no memory of none
    with path.open("rb") as file:
        file.seek(begin)
        if file.readinto(memory) != size:  # type: ignore[attr-defined]
            raise FileError(f"{path} has become shorter while it was read.")
    return _views(torch.frombuffer(memory, dtype=torch.uint8), shard.entries, begin), shard.metadata


def _pages(size: int) -> mmap.mmap:
    """Memory straight from the system, where it can be all at once."""
    if not hasattr(mmap, "MAP_POPULATE"):
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


def _views(held: Tensor, entries: Mapping[str, Entry], begin: int) -> dict[str, Tensor]:
    """The tensors in these bytes of a file, which start at its byte `begin`."""
    whole: dict[str, Tensor] = {}
    found = {}
    for name, (code, shape, start, size) in entries.items():
        dtype, at = DTYPES[code], start - begin
        if at % dtype.itemsize:  # after a tensor of narrower entries
            found[name] = held[at : at + size].clone().view(dtype).view(shape)
            continue
        if code not in whole:
            whole[code] = held[: len(held) // dtype.itemsize * dtype.itemsize].view(dtype)
        found[name] = whole[code].as_strided(shape, _strides(shape), at // dtype.itemsize)
    return found


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor that lies in order."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def tensor_over(held: bytearray, dtype: torch.dtype) -> Tensor:
    """The flat tensor that these bytes are the memory of; torch itself refuses none at all."""
    return torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)


@dataclass(frozen=True)
class Rewritten:
    """sha256 of a file that was read and of the one that was written after it."""

    before: str
    after: str


@dataclass(frozen=True)
class Other:
    """How a file's header is to be another one than that of the file that it is written after."""

    header: bytes
    """The whole of it, with its length in front."""
    added: Mapping[str, tuple[str, Callable[[Tensor], None]]] = field(default_factory=dict)
    """Name of a tensor at the end → the one that it begins as, and what changes it in place."""
    dropped: Collection[str] = ()
    """Tensors that are not written."""


def with_tensors(shard: Shard, copied: Mapping[str, str]) -> bytes:
    """The header of a file that has some tensors a second time at its end, by their new names."""
    header = json.loads(shard.header[8:])
    end = max((values["data_offsets"][1] for name, values in header.items() if name != "__metadata__"), default=0)
    for name, source in copied.items():
        size = shard.entries[source].size
        header[name] = {**header[source], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight, by the specification
    return len(text).to_bytes(8, "little") + text


def rewrite(
    shard: Shard,
    out: Path,
    changes: Mapping[str, Callable[[Tensor], None]],
    *,
    digest: bool,
    other: Other | None = None,
) -> Rewritten:
    """Write `out` as `shard` is, byte for byte, but for the tensors named in `changes`, which these functions change in place,
    and for what is `other` in it. One tensor is in memory at a time. Without `digest` nothing is hashed, and what is returned
    is empty."""
    before, after = hashlib.sha256(), hashlib.sha256()
    other = other or Other(shard.header)
    with shard.path.open("rb") as source, out.open("wb") as target:

        def read(piece: bytes | bytearray) -> None:
            if digest:
                before.update(piece)

        def write(piece: bytes | bytearray) -> None:
            if digest:
                after.update(piece)
            target.write(piece)

        read(shard.header)
        write(other.header)
        for name, entry in shard.entries.items():
            if name in changes:
                held, tensor = read_tensor(source, entry)
                read(held)
                changes[name](tensor)
                write(held)
            else:
                for piece in _pieces(source, entry):
                    read(piece)
                    if name not in other.dropped:
                        write(piece)
        for origin, change in other.added.values():
            held, tensor = read_tensor(source, shard.entries[origin])
            change(tensor)
            write(held)
    return Rewritten(before.hexdigest(), after.hexdigest()) if digest else Rewritten("", "")


def _pieces(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    file.seek(entry.start)
    left = entry.size
    while left:
        piece = file.read(min(left, PIECE))
        if not piece:
            raise FileError("the file ends within a tensor")
        left -= len(piece)
        yield piece
