"""The correction file of a reversible merge: what the base's bytes need beside the merged checkpoint and the adapter.

It is a zip archive, so that each part is compressed and has a checksum. It has manifest.json, and for each merged tensor its
codes, int8, row by row, and its escapes, little-endian integers as wide as the tensor's entries (layers/ops/residual.py). It also
has the base's files beside the weights that the merge replaced (a tokenizer, a config). No model code, no arithmetic.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from deltaw.errors import FileError
from deltaw.files.formats.safetensors import PIECE, tensor_over
from deltaw.files.formats.strict_json import parse_object
from deltaw.layers.ops.residual import EFFORT, Residual, coded, decoded

NAME = "base.correction"
FORMAT = 2
# Format 1 had no files beside the weights
_READ = (1, FORMAT)
# What a zip archive's reader raises for damaged bytes: its own error, of a method or version that it does not know, of encryption
_DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)
# Bytes of a file beside the weights
_LARGEST = 1 << 30
_MANIFEST, _BESIDE, _HEADERS = "manifest.json", "beside", "headers"


@dataclass
class Manifest:
    """The files that the correction belongs to."""

    adapter: str
    """sha256 of the adapter's A, B and scales."""
    shards: dict[str, tuple[str, str]] = field(default_factory=dict)
    """File name → sha256 of the base's file and of the merged one."""
    added: list[str] = field(default_factory=list)
    """Names of files beside the weights that the base has not."""
    untied: dict[str, list[str]] = field(default_factory=dict)
    """File name → tensors in the merged file that the base's has not, for weights that it has once."""
    format: int = FORMAT


def _manifest(text: bytes) -> Manifest:
    """Return the manifest in a JSON text. Raises ValueError for one of other types."""
    values = parse_object(text)
    if unknown := values.keys() - {field.name for field in fields(Manifest)}:
        raise ValueError(f"its manifest has {sorted(unknown)}")
    shards, untied, added = (
        values.get(key, kind()) for key, kind in (("shards", dict), ("untied", dict), ("added", list))
    )
    sound = (
        isinstance(values.get("adapter"), str) and type(values.get("format", FORMAT)) is int and _are_texts(added)
        and isinstance(shards, dict) and all(_are_texts(hashes) and len(hashes) == 2 for hashes in shards.values())
        and isinstance(untied, dict) and all(map(_are_texts, untied.values()))
    )  # fmt: skip
    if not sound:
        raise ValueError("its manifest has values of other types than deltaw writes")
    return Manifest(**values)  # type: ignore[arg-type]


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


class Writer:
    """A correction file that is being written, a tensor's residual at a time."""

    def __init__(self, archive: zipfile.ZipFile, adapter: str) -> None:
        self.archive = archive
        self.manifest = Manifest(adapter)

    def put(self, tensor: str, residual: Residual, shape: tuple[int, ...]) -> None:
        """Write the residual of one tensor of this shape."""
        for part, values in coded(residual, shape)._asdict().items():
            with self.archive.open(f"{part}/{tensor}", "w", force_zip64=True) as stream:
                flat = values.contiguous().view(-1).view(torch.uint8).numpy()
                for at in range(0, len(flat), PIECE):
                    stream.write(flat[at : at + PIECE].data)

    def keep_header(self, file: str, header: bytes, untied: Iterable[str]) -> None:
        """Write the header of a base's file. `untied`: tensors that the merged file has besides the base's."""
        self.archive.writestr(f"{_HEADERS}/{file}", header)
        self.manifest.untied[file] = list(untied)

    def keep(self, before: Mapping[str, bytes], after: Mapping[str, bytes]) -> None:
        """Write the base's files beside the weights, name → content, where they are others in the merged folder (`after`)."""
        for name, content in before.items():
            if after.get(name) != content:
                self.archive.writestr(f"{_BESIDE}/{name}", content)
        self.manifest.added += sorted(after.keys() - before.keys())


@contextmanager
def writing(path: Path, adapter: str) -> Iterator[Writer]:
    """Yield a new correction file for the adapter with this hash.

    The manifest is written last, on leaving without an error: a file without one is no correction.
    """
    with path.open("wb") as file:
        archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=EFFORT)
        try:
            writer = Writer(archive, adapter)
            yield writer
            archive.writestr(_MANIFEST, json.dumps(asdict(writer.manifest), indent=2, sort_keys=True))
            archive.close()
        except BaseException:
            # Its close would write an end, fail where a part is open, and hide what has happened (Ctrl-C, a full disk)
            archive.fp = None
            raise


class Reader:
    """A correction file that is read. Each method, and opening it, raises FileError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
            self.manifest = _manifest(self._bounded(_MANIFEST))
        except (OSError, KeyError, ValueError, *_DAMAGED) as error:
            raise FileError(f"{path} is no correction file, or a damaged one: {error}") from error
        if self.manifest.format not in _READ:
            raise FileError(f"{path} is a correction of format {self.manifest.format}; this version reads {FORMAT}.")

    def get(self, tensor: str, shape: tuple[int, ...], integers: torch.dtype) -> Residual:
        """Return the residual of a tensor of this shape, whose escapes are of that dtype."""
        codes, escapes = self._part("codes", tensor), self._part("escapes", tensor)
        try:
            return decoded(tensor_over(codes, torch.int8).view(shape), tensor_over(escapes, integers))
        except (RuntimeError, ValueError) as error:
            raise FileError(f"{self.path}: {tensor} is of another shape in it, or damaged: {error}") from error

    def header(self, file: str) -> bytes:
        """Return the header of a base's file."""
        try:
            return self._bounded(f"{_HEADERS}/{file}")
        except (KeyError, OSError, ValueError, *_DAMAGED) as error:
            raise FileError(f"{self.path} lacks the header of {file}, or it is damaged: {error}") from error

    def put_back(self, folder: Path) -> None:
        """Write the base's files beside the weights into a folder."""
        names = [name for name in self.archive.namelist() if name.startswith(f"{_BESIDE}/")]
        places = {name: folder / name.removeprefix(f"{_BESIDE}/") for name in names}
        added = [folder / name for name in self.manifest.added]
        if not all(_lies_in(folder, path) for path in (*added, *places.values())):
            raise FileError(f"{self.path} names files outside its folder.")
        for path in added:
            path.unlink(missing_ok=True)
        for name, path in places.items():
            path.parent.mkdir(exist_ok=True)
            try:
                path.write_bytes(self._bounded(name))
            except (OSError, ValueError, *_DAMAGED) as error:
                raise FileError(f"{self.path}: its {path.name} is damaged: {error}") from error

    def _bounded(self, name: str) -> bytes:
        """Return the bytes of a part that is no tensor's. Raises ValueError where they would be more than these ever are."""
        size = self.archive.getinfo(name).file_size
        if size > _LARGEST:
            raise ValueError(f"{name} would have {size:,} bytes")
        return self.archive.read(name)

    def _part(self, part: str, tensor: str) -> bytearray:
        """Return the bytes of a tensor's codes or escapes."""
        name = f"{part}/{tensor}"
        try:
            held = bytearray()  # grows by what is there: the size in the directory may be any
            with self.archive.open(name) as stream:
                while piece := stream.read(PIECE):
                    held += piece
        except (KeyError, OSError, ValueError, *_DAMAGED) as error:
            raise FileError(f"{self.path} lacks the {part} of {tensor}, or they are damaged: {error}") from error
        return held


def _lies_in(folder: Path, path: Path) -> bool:
    """Return whether a path is one of a file within the folder, whatever `..`, links or zeros are in it."""
    try:
        place, root = path.resolve(), folder.resolve()
    except (OSError, ValueError, RuntimeError):
        return False
    return place != root and place.is_relative_to(root)
