"""Read and rewrite safetensors checkpoints: headers, byte ranges, and one tensor at a time in memory. No model code.

The format (safetensors' own specification): eight bytes with the length of a JSON header, the header, and the tensors' bytes
without gaps. A checkpoint is one such file, or several and an index that says which tensor is in which.

Why not safetensors' own loader everywhere? New files are written by its `save_file`. Three uses need more than it gives:

- A merge on disk copies untouched tensors byte for byte, of dtypes unknown to PyTorch too, and takes headers as they are. The
  package gives neither byte ranges nor headers.
- An adapter's memory is its own. `load_file` maps the file: written over, it changes the tensors of a live adapter, and cut
  short, it kills the process (SIGBUS).
- An adapter's memory goes back to the system. After 60 adapters of 7.8 MB were loaded and dropped, 19 MB were left with
  `read_tensors`; 490 MB with `load_file(backend="pread")`, with `load(bytes)` and with copies of what `load_file` maps, as all
  of these allocate from the C library's heap.

Speed is no reason (safetensors 0.8, medians of three interleaved runs, one thread of a busy machine). A file of 7.8 MB with 420
tensors takes 8.7 ms (`load_file` and copies 14.0, pread 8.0, bytes 8.3). One of 352 MB takes 370 ms (377, 485, 772).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltaw.errors import FileError
from deltaw.files.formats.atomic import put_back
from deltaw.files.formats.strict_json import is_natural, parse_object, read_object

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# Bytes that are copied at once
PIECE = 1 << 24
# The specification's own bound of a header, in bytes
_LONGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """One tensor's dtype, shape and place in its file."""

    dtype: str
    """The format's name of it, for example BF16."""
    shape: tuple[int, ...]
    start: int
    """From the beginning of the file, in bytes."""
    size: int
    """In bytes."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file by its header."""

    path: Path
    header: bytes
    """All that stands before the tensors, with its length in front."""
    entries: dict[str, Entry]
    """Tensor name → entry, in the order of their bytes."""
    metadata: dict[str, str]


def shards_of(folder: Path) -> list[Shard]:
    """Return the shards of the checkpoint in `folder`.

    Raises:
        FileError: with everything wrong: no safetensors, a shard that is missing or damaged, an index that names other tensors
            than the shards hold.
    """
    put_back(folder)
    if not (folder / INDEX).is_file():
        if not folder.is_dir():
            raise FileError(f"There is no folder {folder}.")
        if not (folder / SINGLE).is_file():
            raise FileError(f"{folder} holds no safetensors checkpoint: neither {SINGLE} nor {INDEX} is in it.")
        return [read_header(folder / SINGLE)]
    shard_by_tensor = _index(folder / INDEX)
    problems: list[str] = []
    shards: list[Shard] = []
    for name in dict.fromkeys(shard_by_tensor.values()):
        try:
            shards.append(read_header(folder / name))
        except FileError as error:
            problems.append(str(error))
    held_in = {tensor: shard.path.name for shard in shards for tensor in shard.entries}
    if not problems:
        problems += [
            f"{INDEX} places {tensor} in {shard}, which lacks it"
            for tensor, shard in shard_by_tensor.items()
            if held_in.get(tensor) != shard
        ]
        problems += [
            f"{shard} holds {tensor}, which {INDEX} does not name"
            for tensor, shard in held_in.items()
            if tensor not in shard_by_tensor
        ]
    if problems:
        raise FileError(f"The checkpoint in {folder} cannot be used:", problems)
    return shards


def _index(path: Path) -> dict[str, str]:
    """Return the index's tensor name → shard's file name. Raises FileError."""
    try:
        entries = read_object(path).get("weight_map")
    except FileError as error:
        raise FileError(f"{path} cannot be read as an index of shards: {error}") from error
    if not isinstance(entries, dict):
        raise FileError(f"{path} cannot be read as an index of shards: it has no weight_map.")
    names = {tensor: name for tensor, name in entries.items() if isinstance(name, str)}
    if names.keys() != entries.keys() or any(Path(name).name != name for name in names.values()):
        raise FileError(f"{path} names shards outside its folder.")
    return names


def read_header(path: Path) -> Shard:
    """Read the header of one safetensors file and check it against the file's size. Raises FileError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            whole = path.stat().st_size
            if not 0 < length <= min(whole - 8, _LONGEST_HEADER):
                raise ValueError(f"its header would have {length:,} bytes, the file has {whole:,}")
            text = file.read(length)
        header = parse_object(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no mapping of texts")
        return Shard(path, length.to_bytes(8, "little") + text, _entries(header, 8 + length, whole), metadata)
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is no sound safetensors file: {error}") from error


def _entries(header: Mapping[str, object], begin: int, whole: int) -> dict[str, Entry]:
    """Return the header's entries in the order of their bytes. Raises ValueError where they do not fill the file exactly."""
    entries = {}
    for name, values in header.items():
        entries[name] = _entry(name, values, begin)
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


def _entry(name: str, values: object, begin: int) -> Entry:
    """Return one entry of a header. Raises ValueError where its shape and place are no natural numbers."""
    dtype, shape, place = (
        (values.get(key) for key in ("dtype", "shape", "data_offsets"))
        if isinstance(values, dict)
        else (None, None, None)
    )
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2:
        raise ValueError(f"{name[:200]} has no dtype, shape and data_offsets")
    # A dimension of 0 may stand beside any others, which must not overflow where they are multiplied
    if not all(map(is_natural, (*shape, *place))) or not is_natural(math.prod(n for n in shape if n)):
        raise ValueError(f"the shape and place of {name[:200]} are no natural numbers: {shape!r:.100}, {place!r:.100}")
    return Entry(dtype, tuple(shape), begin + place[0], place[1] - place[0])


def read_tensor(file: BufferedReader, entry: Entry) -> tuple[bytearray, Tensor]:
    """Return one tensor's bytes, and the tensor that they are the memory of. Raises FileError for an unknown dtype."""
    if entry.dtype not in DTYPES:
        raise FileError(f"dtype {entry.dtype} is not known")
    held = bytearray(entry.size)
    file.seek(entry.start)
    if file.readinto(held) != entry.size:
        raise FileError("the file ends within a tensor")
    return held, tensor_over(held, DTYPES[entry.dtype]).view(entry.shape)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of one file, in the order of their bytes, and the header's metadata.

    The file is read once, into one buffer that the tensors are views of. Raises FileError.
    """
    shard = read_header(path)
    unknown = [f"{name} is {entry.dtype}" for name, entry in shard.entries.items() if entry.dtype not in DTYPES]
    if unknown:
        raise FileError(f"{path} has tensors of a dtype that is not known:", unknown)
    begin = len(shard.header)
    size = path.stat().st_size - begin
    memory = _pages(max(size, 1))  # the system gives no memory of 0 bytes
    with path.open("rb") as file:
        file.seek(begin)
        if file.readinto(memory) != size:
            raise FileError(f"{path} has become shorter while it was read.")
    held = torch.frombuffer(memory, dtype=torch.uint8)
    return {name: _view(held, entry, entry.start - begin) for name, entry in shard.entries.items()}, shard.metadata


def _pages(size: int) -> mmap.mmap:
    """Return memory straight from the system, where possible with all of its pages at once."""
    if not hasattr(mmap, "MAP_POPULATE"):
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


def _view(held: Tensor, entry: Entry, at: int) -> Tensor:
    """Return the tensor that begins at byte `at` of `held`, uint8."""
    values, dtype = held[at : at + entry.size], DTYPES[entry.dtype]
    # Behind a tensor of narrower entries it may begin where PyTorch reads no entries of this width
    return (values.clone() if at % dtype.itemsize else values).view(dtype).view(entry.shape)


def tensor_over(held: bytearray, dtype: torch.dtype) -> Tensor:
    """Return the flat tensor that these bytes are the memory of. (PyTorch refuses an empty one.)"""
    return torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whose bytes follow from its content alone.

    The package writes the metadata in an order that differs from process to process: equal adapters were unequal files.
    """
    save_file(dict(tensors), path, metadata=dict(metadata))
    shard = read_header(path)
    header = json.loads(shard.header[8:])
    header["__metadata__"] = dict(sorted(shard.metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    space = len(shard.header) - 8 - len(text)
    if space < 0:
        raise FileError(f"{path} has a header that cannot be put in order: it would be {-space} bytes longer.")
    with path.open("r+b") as file:
        file.seek(8)
        file.write(text + b" " * space)


@dataclass(frozen=True)
class Rewritten:
    """Hashes (sha256) of a file that was read and of the one that was written after it."""

    before: str
    after: str


@dataclass(frozen=True)
class Other:
    """The header of a rewritten file, and the tensors that it has more or fewer than its source."""

    header: bytes
    """The whole of it, with its length in front."""
    added: Mapping[str, tuple[str, Callable[[Tensor], None]]] = field(default_factory=dict)
    """Name of a tensor at the end → the source's tensor that it begins as, and what changes it in place."""
    dropped: Collection[str] = ()
    """Tensors that are not written."""


def with_tensors(shard: Shard, copied: Mapping[str, str]) -> bytes:
    """Return the header of a file that has copies of some tensors at its end. `copied`: new name → the tensor's name."""
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
    """Write `out` as `shard` is, byte for byte, except for changed tensors. One tensor is in memory at a time.

    Args:
        shard: the source.
        out: the new file.
        changes: tensor name → what changes that tensor in place.
        digest: hash both files. Without it, the hashes returned are empty.
        other: another header, with tensors more or fewer.
    """
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


def _pieces(file: BufferedReader, entry: Entry) -> Iterator[bytes]:
    """Yield a tensor's bytes, at most PIECE at once. Raises FileError where the file ends before them."""
    file.seek(entry.start)
    left = entry.size
    while left:
        piece = file.read(min(left, PIECE))
        if not piece:
            raise FileError("the file ends within a tensor")
        left -= len(piece)
        yield piece
