"""The few integers that make subtracting a merge exact: round(W' − ΔW) against W0, in units in the last place. Knows tensors
only.

W' = round(W0 + ΔW) has lost the bits of W0 below its own precision, so subtracting ΔW gives W0 but for some units in the
last place. As bit patterns, neighbouring floats are neighbouring integers; the residual of an entry is the difference of two
such integers. Nearly all are zero or fit a byte; those that do not (a W0 that ΔW swamped) are kept whole, in order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# How hard to compress codes (zlib's level): they are nearly all zeros, and more effort than this finds little more
EFFORT = 1
# The code of an entry whose difference fits no byte
_ESCAPE = -128


class Residual(NamedTuple):
    """The differences of a weight, or of a block of its rows."""

    codes: Tensor
    """int8, shaped like the block: the difference, or −128 for the next of `escapes`."""
    escapes: Tensor
    """Differences that fit no byte, in the order of their entries; integers as wide as the weight's."""


def between(W0: Tensor, back: Tensor) -> Residual:
    """Return what added to `back` gives W0, both of one shape and float dtype. Any bits are kept, those of NaN too.

    >>> import torch
    >>> W0, back = torch.tensor([1.0, -0.0]), torch.tensor([1.0000001, 0.5])
    >>> bool((corrected(back, between(W0, back)).view(torch.int32) == W0.view(torch.int32)).all())
    True
    """
    difference = _ordinals(W0) - _ordinals(back)  # wraps around, and back again in `corrected`
    if difference.numel() and all(-127 <= int(extreme) <= 127 for extreme in torch.aminmax(difference)):
        return Residual(difference.to(torch.int8), difference.new_empty(0))
    wide = (difference < -127) | (difference > 127)
    return Residual(difference.masked_fill(wide, _ESCAPE).to(torch.int8), difference[wide])


def corrected(back: Tensor, residual: Residual) -> Tensor:
    """Return W0, bit for bit: the inverse of `between`."""
    ordinals = _ordinals(back)
    difference = residual.codes.to(ordinals.dtype)
    if escaped(residual.codes):
        difference[residual.codes == _ESCAPE] = residual.escapes
    return _bits(ordinals + difference).view(back.dtype)


def integers_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a weight's escapes."""
    return _INTEGERS[dtype.itemsize]


def escaped(codes: Tensor) -> int:
    """Count the entries whose difference is among the escapes."""
    if codes.device.type != "cpu":
        return int(torch.count_nonzero(codes == _ESCAPE))
    return int(numpy.count_nonzero(numpy.equal(codes.numpy(), _ESCAPE)))


def _ordinals(values: Tensor) -> Tensor:
    """Return integers in the order of the floats, neighbours one apart."""
    return _bits(values.contiguous().view(integers_of(values.dtype)))


def _bits(integers: Tensor) -> Tensor:
    """Convert sign and magnitude ↔ two's complement: negative integers have all bits but the sign's inverted."""
    width = 8 * integers.element_size()
    return integers ^ ((integers >> (width - 1)) & ((1 << (width - 1)) - 1))
