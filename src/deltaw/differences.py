"""Values in place of a base's own as differences from them, and back bit for bit. Knows tensors, nothing of models or files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# What a tensor's name is followed by: places of entries that W0 + ΔW does not give back, and these entries
_WHERE, _ENTRIES = ":where", ":entries"


def as_difference(name: str, W: Tensor, W0: Tensor) -> dict[str, Tensor]:
    """ΔW = W − W0 in W's dtype, fp32 or wider, under `name`; and, since fl(W0 + fl(W − W0)) is not always W (it is where they are
    within a factor of two: Sterbenz), the entries where it is not."""
    dW = (W - W0.to(W.dtype)).nan_to_num(posinf=0, neginf=0)
    where = (_bits(W0.to(W.dtype) + dW) != _bits(W)).flatten().nonzero().flatten()
    if not len(where):
        return {name: dW}
    return {name: dW, name + _WHERE: where, name + _ENTRIES: W.flatten()[where]}


def from_difference(name: str, tensors: Mapping[str, Tensor], W0: Tensor) -> Tensor:
    """W, on the CPU as `tensors` are."""
    W = W0.to(tensors[name]) + tensors[name]
    if name + _WHERE in tensors:
        W.view(-1)[tensors[name + _WHERE]] = tensors[name + _ENTRIES]
    return W


def problems_with(tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the entries beside differences, in words."""
    found = []
    for name, dW in tensors.items():
        where, entries = tensors.get(name + _WHERE), tensors.get(name + _ENTRIES)
        if where is None and entries is None:
            continue
        if where is None or entries is None or not _are_entries(where, entries, dW.numel()):
            found.append(f"{name}: the entries kept beside its difference are not entries of it")
    return found


def _are_entries(where: Tensor, entries: Tensor, count: int) -> bool:
    if where.dtype != torch.int64 or where.ndim != 1 or where.shape != entries.shape:
        return False
    return not where.numel() or 0 <= int(where.min()) <= int(where.max()) < count


def is_beside(name: str) -> bool:
    """Whether it is the name of what stands beside a difference."""
    return name.endswith((_WHERE, _ENTRIES))


def _bits(tensor: Tensor) -> Tensor:
    """As integers: −0 and 0 are equal as numbers."""
    return tensor.contiguous().view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)
