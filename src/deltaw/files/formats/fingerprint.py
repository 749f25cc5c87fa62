"""The fingerprint of the base that an adapter belongs to. Knows no model.

It consists of hashes over shapes and every entry of its tensors, in order, whatever the tensors' names: another version of a
library may change those. The content of a tensor is hashed by XXH3 with 128 bits, which reads as fast as memory gives. It tells
any two contents apart that nobody made on purpose to be alike.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.layers.ops.checksums import content_of, octets

EXACT, DTYPES = "exact", "dtypes"
ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Hashes of values that are rounded first, by which a base in another precision is recognised."""
FORMS = (EXACT, *ROUNDED, DTYPES)
"""All hashes that a fingerprint has."""

_VERSION = "2"
_HASH = re.compile(r"[0-9a-f]{32}(/[\w,]+)?")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Outdated(ValueError):
    """A fingerprint of the first version, which covered sampled entries alone."""


@dataclass(frozen=True)
class Fingerprint:
    """Hex digests, 32 characters each. The names of the dtypes stand behind theirs."""

    exact: str
    bfloat16: str
    float16: str
    dtypes: str

    def __str__(self) -> str:
        return ":".join((_VERSION, *(getattr(self, form) for form in FORMS)))

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """Read what `str` gives. Raises ValueError for another text, and Outdated for one of the first version."""
        version, *hashes = text.split(":")
        if _HASH.fullmatch(version) and len(hashes) == 2:
            raise Outdated(text)
        if version != _VERSION or len(hashes) != len(fields(cls)) or not all(map(_HASH.fullmatch, hashes)):
            raise ValueError(f"{text!r} is no fingerprint")
        return cls(*hashes)

    def compare(self, other: Fingerprint) -> str:
        """Return "same" for one base bit for bit, "cast" for one in two precisions, else "different"."""
        return self.compare_by(lambda form: str(getattr(other, form)))

    def compare_by(self, other: Callable[[str], str | None]) -> str:
        """Compare with a base whose hashes are computed on demand. Only those that decide are asked for.

        Args:
            other: form → the base's hash; None where its values cannot be read.

        Returns:
            "same" (bit for bit), "cast" (in another precision), "different", or "unknown" where `other` gives None.
        """
        dtypes = other(DTYPES) or ""
        if dtypes == self.dtypes:
            exact = other(EXACT)
            return "unknown" if exact is None else "same" if exact == self.exact else "different"
        there = {name for text in (dtypes, self.dtypes) for name in text.partition("/")[2].split(",")}
        narrow = there & ROUNDED.keys()  # without any, float64 beside float32: both have to agree
        rounded = {form: other(form) for form in ROUNDED if form in narrow or not narrow}
        if None in rounded.values():
            return "unknown"
        alike = [value == getattr(self, form) for form, value in rounded.items()]
        return "cast" if (any(alike) if narrow else all(alike)) else "different"


class Digest(NamedTuple):
    """One tensor's part in a hash."""

    shape: tuple[int, ...]
    content: bytes
    dtype: str = ""


def digest(tensor: Tensor, form: str, content: Callable[[Tensor, torch.dtype], bytes] | None = None) -> Digest:
    """Return a tensor's part in the hash of this form. `content` is `content_of`, or a function that caches what that gives."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if form == DTYPES:
        return Digest(shape, dtype.encode(), dtype)
    rounded = form in ROUNDED and tensor.is_floating_point()
    bits = (content or content_of)(tensor, ROUNDED[form] if rounded else tensor.dtype)
    return Digest(shape, bits if rounded else dtype.encode() + bits)


def combined(digests: Iterable[Digest]) -> str:
    """Return the hash of several tensors. Among those of one shape the order counts."""
    ordered = sorted(digests, key=lambda one: one.shape)  # a stable sort
    hashed = hashlib.sha256()
    for shape, content, _ in ordered:
        hashed.update(f"{shape} {len(content)} ".encode() + content)
    names = {one.dtype for one in ordered if one.dtype}
    return hashed.hexdigest()[:32] + (f"/{','.join(sorted(names))}" if names else "")


def bits_of(flat: Tensor) -> Tensor:
    """Return a flat tensor's entries as integers of their width, by which NaN equals itself, and 0.0 is not −0.0."""
    return flat.view(_BITS[flat.element_size()])


def bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes of the entries in order, of a tensor on the CPU."""
    return bytes(octets(tensor.contiguous().reshape(-1)).tobytes())
