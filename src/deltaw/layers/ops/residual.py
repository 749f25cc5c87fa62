"""The few integers that make subtracting a merge exact: round(W' − ΔW) against W0, in units in the last place. Knows tensors
only.

W' = round(W0 + ΔW) has lost the bits of W0 below its own precision, so subtracting ΔW gives W0 but for some units in the
last place. As bit patterns, neighbouring floats are neighbouring integers; the residual of an entry is the difference of two
such integers. Nearly all are zero or fit a byte; those that do not (a W0 that ΔW swamped) are kept whole, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# How hard to compress codes in a file (zlib's level): they are nearly all zeros, and more effort than this finds little more
EFFORT = 1
# The code of an entry whose difference fits no byte
_ESCAPE = -128
_LONG = 255
"""The byte of a gap that goes on in the next byte."""


class Residual(NamedTuple):
    """The differences of a weight that are not zero. Both on the weight's device."""

    places: Tensor
    """[n] int64, ascending: indices of the entries, counted row by row."""
    differences: Tensor
    """[n], integers as wide as the weight's entries."""


def between(W0: Tensor, back: Tensor, start: int = 0) -> Residual:
    """Return what added to `back` gives W0, any bits, those of NaN too. Both are contiguous and of one shape and float dtype.

    They are a block of rows of a weight, whose first entry has the place `start` in it.

    >>> import torch
    >>> W0, back = torch.tensor([1.0, -0.0]), torch.tensor([1.0000001, 0.5])
    >>> correct_(back, between(W0, back))
    >>> bool((back.view(torch.int32) == W0.view(torch.int32)).all())
    True
    """
    places = places_of_difference(W0, back)
    ordinals, others = (_bits(_integers(values)[places]) for values in (W0, back))
    return Residual(places + start, ordinals - others)  # wraps around, and back again in `correct_`


def correct_(back: Tensor, residual: Residual, start: int = 0) -> None:
    """Make W0 of a contiguous `back` in place, bit for bit: the inverse of `between`, of a block that begins at `start`."""
    ends = torch.tensor([start, start + back.numel()], device=residual.places.device)
    first, last = torch.searchsorted(residual.places, ends).tolist()
    places, integers = residual.places[first:last] - start, _integers(back)
    integers[places] = _bits(_bits(integers[places]) + residual.differences[first:last])


def joined(blocks: Sequence[Residual]) -> Residual:
    """Return the residual of a weight from those of its blocks in order."""
    return Residual(torch.cat([b.places for b in blocks]), torch.cat([b.differences for b in blocks]))


class Codes(NamedTuple):
    """A residual as a correction file has it, on the CPU."""

    codes: Tensor
    """int8, shaped like the weight: the difference, or −128 for the next of `escapes`."""
    escapes: Tensor
    """Differences that fit no byte, in the order of their entries; integers as wide as the weight's."""


def coded(residual: Residual, shape: Sequence[int]) -> Codes:
    """Return the codes of a residual of a weight of this shape."""
    places, short, escapes = _short(residual)
    codes = torch.zeros(tuple(shape), dtype=torch.int8)
    codes.view(-1)[places] = short
    return Codes(codes, escapes)


def decoded(codes: Tensor, escapes: Tensor) -> Residual:
    """Return the residual. Raises ValueError where the number of escapes is not that of the codes."""
    flat = codes.view(-1)
    places = torch.from_numpy(_nonzero(flat.numpy() != 0))
    return Residual(places, _long(flat[places], escapes))


class Packed(NamedTuple):
    """A residual in memory: two bytes for a difference, most often."""

    gaps: Tensor
    """uint8: for each difference the entries since the last one, in bytes that are added up; one of 255 goes on in the next."""
    short: Tensor
    """int8: the differences, or −128 for the next of `escapes`."""
    escapes: Tensor

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self)


def packed(residual: Residual) -> Packed:
    """Return the residual in few bytes, on the CPU.

    >>> import torch
    >>> some = Residual(torch.tensor([3, 700]), torch.tensor([-1, 4000]))
    >>> packed(some).gaps.tolist(), packed(some).bytes
    ([3, 255, 255, 187], 14)
    >>> unpacked(packed(some)).places.tolist()
    [3, 700]
    """
    places, short, escapes = _short(residual)
    gaps = torch.diff(places, prepend=places.new_zeros(1))
    whole = torch.div(gaps, _LONG, rounding_mode="floor")
    ends = (whole + 1).cumsum(0) - 1
    octets = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), _LONG, dtype=torch.uint8)
    octets[ends] = (gaps - whole * _LONG).to(torch.uint8)
    return Packed(octets, short, escapes)


def unpacked(packed: Packed) -> Residual:
    """Return the residual: the inverse of `packed`."""
    places = packed.gaps.cumsum(0, dtype=torch.int64)[packed.gaps != _LONG]
    return Residual(places, _long(packed.short, packed.escapes))


def _short(residual: Residual) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places, the differences in a byte each, and those that fit none; on the CPU."""
    places, differences = residual.places.cpu(), residual.differences.cpu()
    wide = (differences < -127) | (differences > 127)
    return places, differences.masked_fill(wide, _ESCAPE).to(torch.int8), differences[wide]


def _long(short: Tensor, escapes: Tensor) -> Tensor:
    """Return the differences. Raises ValueError where the number of escapes is not that of the codes."""
    differences, wide = short.to(escapes.dtype), short == _ESCAPE
    if int(wide.sum()) != len(escapes):
        raise ValueError(f"{len(escapes)} escapes for {int(wide.sum())} codes of one")
    differences[wide] = escapes
    return differences


def integers_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a weight's escapes."""
    return _INTEGERS[dtype.itemsize]


def places_of_difference(a: Tensor, b: Tensor) -> Tensor:
    """Return where two contiguous tensors of one shape and dtype differ in their bits: flat indices in order, int64."""
    one, two = _integers(a), _integers(b)
    if a.device.type != "cpu":
        return torch.nonzero(one != two).view(-1)
    if torch.equal(one, two):
        return torch.empty(0, dtype=torch.int64)
    return torch.from_numpy(_nonzero(numpy.not_equal(one.numpy(), two.numpy())))


def _nonzero(flags: NDArray[numpy.bool_]) -> NDArray[numpy.int64]:
    """Return where a flat array of flags is set. Few are: eight at a time are looked at first."""
    if len(flags) % 8:
        return numpy.flatnonzero(flags)
    eights = numpy.flatnonzero(flags.view(numpy.uint64))
    places: NDArray[numpy.int64] = (eights[:, None] * 8 + numpy.arange(8)).ravel()
    return places[flags[places]]


def _integers(values: Tensor) -> Tensor:
    """Return the bits of a contiguous tensor as a flat view of integers."""
    return values.view(-1).view(integers_of(values.dtype))


def _bits(integers: Tensor) -> Tensor:
    """Convert sign and magnitude ↔ two's complement: negative integers have all bits but the sign's inverted.

    Of the bits of floats it makes integers in the order of the floats, neighbours one apart.
    """
    width = 8 * integers.element_size()
    return integers ^ ((integers >> (width - 1)) & ((1 << (width - 1)) - 1))
