"""Hashes of a tensor's content, every entry in order.

XXH3 with 128 bits reads host memory as fast as memory gives. It tells any two contents apart that nobody constructed to collide.
A tensor on another device is summed there, with a factor for each place, so that nothing is copied. Knows tensors alone.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import xxhash
from torch import Tensor

_PIECE = 1 << 20
"""Entries that are rounded, or copied to host memory, at once."""
_FACTOR = -7046029254386353131
"""Odd, as all factors of a sum are: a product with one loses no bit."""
_WORDS = 1 << 20
"""64-bit words that are summed at once. The same everywhere, since a sum goes from block to block."""


class Stamp(NamedTuple):
    """A tensor's dtype, shape and checksum. Equal stamps mean the same bits in the same places, on whatever device."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    by: Literal["host", "device"]
    """The kind of checksum: XXH3 of host memory, or the sum that a device makes."""
    checksum: bytes


def content_of(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """Return the XXH3 hash of a tensor's entries in order, rounded to `dtype`: 16 bytes. It reads the tensor once."""
    flat = tensor.detach().reshape(-1)
    hashed = xxhash.xxh3_128()
    if flat.device.type == "cpu" and flat.dtype == dtype:
        hashed.update(octets(flat))
        return hashed.digest()
    size = min(flat.numel(), _PIECE)
    host = torch.empty(size, dtype=dtype, pin_memory=flat.device.type == "cuda")
    for piece in flat.split(_PIECE) if size else ():
        single = piece.float() if piece.dtype == torch.float64 and dtype.itemsize == 2 else piece
        hashed.update(octets(host[: len(piece)].copy_(single.to(dtype) if flat.device.type != "cpu" else single)))
    return hashed.digest()


def stamp(W: Tensor, by: Literal["host", "device"] | None = None) -> Stamp:
    """Read a tensor of any dtype and strides once. By default a tensor on the CPU is hashed, any other summed where it is."""
    by = by or ("host" if W.device.type == "cpu" else "device")
    checksum = content_of(W, W.dtype) if by == "host" else _summed(W.detach())
    return Stamp(W.dtype, tuple(W.shape), by, checksum)


def difference(W: Tensor, was: Stamp) -> str | None:
    """Say how W differs from the tensor that the stamp is of; None where it is the same."""
    if tuple(W.shape) != was.shape:
        return f"it is {list(W.shape)} now, it was {list(was.shape)}"
    if W.dtype != was.dtype:
        now, before = (str(dtype).removeprefix("torch.") for dtype in (W.dtype, was.dtype))
        return f"it is {now} now, it was {before}"
    return None if stamp(W, was.by) == was else "its values have changed"


def _summed(W: Tensor) -> bytes:
    """Return Σ word·factor over a tensor's 64-bit words, modulo 2⁶⁴; the factor depends on the word's place."""
    factors = torch.arange(_WORDS, device=W.device) * _FACTOR
    factors = (factors ^ (factors >> 29)) | 1
    total = torch.zeros((), dtype=torch.int64, device=W.device)
    for piece in W.reshape(-1).split(8 * _WORDS // W.element_size()):
        data = piece.contiguous().view(torch.uint8)
        data = torch.nn.functional.pad(data, (0, -len(data) % 8))
        words = data.view(torch.int64) * _FACTOR
        words = words ^ (words >> 32)  # a change of the highest bit alone must not cancel with another
        total = total * _FACTOR + (words * factors[: len(words)]).sum()
    return int(total).to_bytes(8, "big", signed=True)


def octets(flat: Tensor) -> memoryview:
    """Return the bytes of a flat tensor on the CPU, not copied."""
    return flat.view(torch.uint8).numpy().data
