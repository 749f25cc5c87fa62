"""Which base an adapter belongs to: a hash over the shapes and content of its tensors, whatever their names: another version of a
library may change those. Knows no model.

`exact` covers dtypes and every bit: a position-free 64-bit sum of each tensor's content, one pass at memory speed, with a
sha256 over evenly spaced entries. The other two cover those entries rounded to bfloat16 and to float16, so that a base
loaded in another precision is still recognised as the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SAMPLES = 1024
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """Hex digests, 32 characters each."""

    exact: str
    bfloat16: str
    float16: str

    def __str__(self) -> str:
        return f"{self.exact}:{self.bfloat16}:{self.float16}"

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """The inverse of `str`. Raises ValueError."""
        exact, bfloat16, float16 = text.split(":")
        return cls(exact, bfloat16, float16)

    def compare(self, other: Fingerprint) -> str:
        """ "same" (bit for bit), "cast" (one is the other in another precision) or "different"."""
        if self.exact == other.exact:
            return "same"
        return "cast" if self.bfloat16 == other.bfloat16 or self.float16 == other.float16 else "different"


class Digest(NamedTuple):
    """Of one tensor, whatever its name."""

    exact: bytes
    bfloat16: bytes
    float16: bytes


def digest(tensor: Tensor) -> Digest:
    """Reads the tensor once."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].cpu()
    shape = f"{tuple(tensor.shape)}".encode()
    total = int(bits_of(flat).sum(dtype=torch.int64)) if flat.numel() else 0
    exact = b"%s %s %d" % (shape, str(tensor.dtype).encode(), total)
    parts = exact + bytes_of(sample), *(shape + bytes_of(sample.to(t)) for t in (torch.bfloat16, torch.float16))
    return Digest(*(hashlib.sha256(part).digest() for part in parts))


def combined(digests: Iterable[Digest]) -> Fingerprint:
    """Of tensors in any order."""
    hashes = [hashlib.sha256(b"".join(sorted(part))) for part in zip(*digests, strict=True)]
    return Fingerprint(*(h.hexdigest()[:32] for h in hashes or [hashlib.sha256()] * 3))


def bits_of(flat: Tensor) -> Tensor:
    """A flat tensor's entries as integers of their width: NaN is like itself in them, and 0.0 is not −0.0."""
    return flat.view(_BITS[flat.element_size()])


def bytes_of(tensor: Tensor) -> bytes:
    """Its entries in order, of a tensor on the CPU."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
