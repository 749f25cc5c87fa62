"""Which base an adapter belongs to: a hash over the names, shapes and content of its tensors. Knows no model.

Two hashes are kept. `exact` covers dtypes and every bit: a position-free 64-bit sum of each tensor's content, one pass at
memory speed, with a sha256 over evenly spaced entries. `values` covers those entries rounded to bfloat16, so that a base
loaded in another precision is still recognised as the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLES = 1024
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """Hex digests, 32 characters each."""

    exact: str
    values: str

    def __str__(self) -> str:
        return f"{self.exact}:{self.values}"

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """The inverse of `str`. Raises ValueError."""
        exact, values = text.split(":")
        return cls(exact, values)

    def compare(self, other: Fingerprint) -> str:
        """ "same" (bit for bit), "cast" (the same values in another precision) or "different"."""
        if self.exact == other.exact:
            return "same"
        return "cast" if self.values == other.values else "different"


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """Of (name, tensor) pairs, in any order. Reads every tensor once."""
    exact, values = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].cpu()
        head = f"{name} {tuple(tensor.shape)}".encode()
        total = int(flat.view(_BITS[flat.element_size()]).sum(dtype=torch.int64)) if flat.numel() else 0
        exact.update(b"%s %s %d" % (head, str(tensor.dtype).encode(), total))
        exact.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
        values.update(head)
        values.update(sample.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return Fingerprint(exact.hexdigest()[:32], values.hexdigest()[:32])
