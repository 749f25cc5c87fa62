"""Which adapters are on the device of their layers, while the others wait in host memory. Knows tensors by adapters' names, no
model.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_lock = threading.Lock()


@dataclass
class _Kept:
    """One parameter of an adapter that is kept in host memory."""

    parameter: nn.Parameter
    host: Tensor
    device: torch.device
    """Of its layer."""


@dataclass
class Residency:
    """The adapters that are kept in host memory, and which of them are on the device besides: at most `most`, the ones that were
    used last. One that a thread computes with stays."""

    most: int = 16
    kept: dict[str, list[_Kept]] = field(default_factory=dict)
    here: dict[str, None] = field(default_factory=dict)
    """On the device, the one that was used last at the end."""

    def keep(self, name: str, parameters: Iterable[tuple[nn.Parameter, torch.device]]) -> None:
        """These parameters, which are in host memory, are this adapter's; they go to these devices when it is used."""
        self.kept[name] = [_Kept(p, p.data, device) for p, device in parameters]

    def forget(self, name: str) -> None:
        self.kept.pop(name, None)
        self.here.pop(name, None)

    def bring(self, names: Iterable[str | None], held: Collection[str | None] = ()) -> None:
        """Before these adapters are used: to the device with them. Others leave it where there are too many, but not `held`."""
        if not self.kept:
            return
        wanted = dict.fromkeys(name for name in names if name is not None and name in self.kept)
        with _lock:
            for name in wanted:
                if name not in self.here:
                    _to_device(self.kept[name])
                self.here.pop(name, None)
                self.here[name] = None
            for name in [n for n in self.here if n not in wanted and n not in held][: len(self.here) - self.most]:
                _to_host(self.kept[name])
                del self.here[name]


def _to_device(kept: list[_Kept]) -> None:
    for each, there in zip(kept, _moved([(each.host, each.device) for each in kept]), strict=True):
        each.parameter.data = there


def _to_host(kept: list[_Kept]) -> None:
    """As they are now: no count of changes sees all who write to a tensor."""
    host = torch.device("cpu")
    for each, back in zip(kept, _moved([(each.parameter.detach(), host) for each in kept]), strict=True):
        each.parameter.data = each.host = back


def _moved(tensors: list[tuple[Tensor, torch.device]]) -> list[Tensor]:
    """Each tensor on its device. A file's are views of one piece of memory, which is copied as a whole: hundreds of copies take
    longer."""
    size = sum(tensor.numel() * tensor.element_size() for tensor, _ in tensors)
    pieces: dict[tuple[int, torch.device], Tensor] = {}
    moved = []
    for tensor, device in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() > 2 * size:  # a part of something else
            moved.append(tensor.to(device, copy=True))
            continue
        key = storage.data_ptr(), device
        if key not in pieces:
            piece = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            pieces[key] = piece.to(device, non_blocking=device.type != "cpu")
        view = torch.empty(0, dtype=tensor.dtype, device=device)
        moved.append(view.set_(pieces[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()))
    return moved
