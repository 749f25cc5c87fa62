"""The adapters that are on the device of their layers, while others wait in host memory. Knows tensors by adapters' names."""

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
    """The layer's device."""


@dataclass
class Residency:
    """The adapters that are kept in host memory, and which of them are on the device besides: at most `most`, the ones that were
    used last. One that a thread computes with stays."""

    most: int = 16
    kept: dict[str, list[_Kept]] = field(default_factory=dict)
    here: dict[str, None] = field(default_factory=dict)
    """On the device, the one that was used last at the end."""

    def keep(self, name: str, parameters: Iterable[tuple[nn.Parameter, torch.device]]) -> None:
        """Note an adapter's parameters, which are in host memory, and the devices that they go to when it is used."""
        self.kept[name] = [_Kept(p, p.data, device) for p, device in parameters]

    def forget(self, name: str) -> None:
        """Drop an adapter that is no longer attached."""
        self.kept.pop(name, None)
        self.here.pop(name, None)

    def bring(self, names: Iterable[str | None], held: Collection[str | None] = ()) -> None:
        """Move adapters to their devices before they are used. Where too many are there, others leave, but none of `held`."""
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
    for item, there in zip(kept, _moved([(item.host, item.device) for item in kept]), strict=True):
        item.parameter.data = there


def _to_host(kept: list[_Kept]) -> None:
    """Copy the parameters as they are now to host memory: no count of changes sees all who write to a tensor."""
    host = torch.device("cpu")
    for item, back in zip(kept, _moved([(item.parameter.detach(), host) for item in kept]), strict=True):
        item.parameter.data = item.host = back


def _moved(tensors: list[tuple[Tensor, torch.device]]) -> list[Tensor]:
    """Return each tensor on its device. A file's tensors are views of one piece of memory, which is copied as a whole: hundreds
    of copies take longer."""
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
