"""Weights that are dealt out over processes by torch's `fully_shard` (FSDP2): each process holds a part of each.

Whoever reads or writes such a weight does it in all processes at once, between `whole` and its end: there each has the tensors as
they would be in one process.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deltaw.errors import AdapterError, shown
from deltaw.layers.processes.ranks import ALONE, Ranks, are_joined, as_lost

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


_MMAP_THRESHOLD = -3
"""glibc's number of the setting (mallopt(3))."""


def is_part(tensor: Tensor | None) -> bool:
    """Return whether this process holds a part of the tensor's values alone."""
    types = sys.modules.get("torch.distributed.tensor")  # without which there is none
    return types is not None and isinstance(tensor, types.DTensor)


def is_dealt(model: nn.Module) -> bool:
    """Return whether the model's weights are dealt out, by `fully_shard` or as other distributed tensors."""
    if not are_joined():
        return False
    return any(is_part(p) for p in model.parameters()) or any(True for _ in _dealt_modules(model))


def ranks_of(model: nn.Module) -> Ranks:
    """Return this process's place among those that hold the model's parts; ALONE where it holds the model whole."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if is_dealt(model) else ALONE


def full(tensor: Tensor) -> Tensor:
    """Return a tensor with all its values; all processes must ask for it. One that is whole is returned as it is."""
    if not is_part(tensor):
        return tensor
    with torch.no_grad(), as_lost():
        values: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return values


@contextlib.contextmanager
def whole(model: nn.Module, parameters: Callable[[], Iterable[nn.Parameter]] | None = None) -> Iterator[None]:
    """Put parameters that are dealt out whole in their places, while open, and deal their values out again after it.

    All processes must open it, and do the same in it. It takes the memory of these parameters whole.

    Args:
        model: with the parameters.
        parameters: returns those that are wanted. None: all.

    Raises:
        AdapterError: parameters are dealt out in a way that values cannot be given back to.
    """
    if not are_joined():
        yield
        return
    for module in _dealt_modules(model):
        module.reshard()  # after a forward pass, values that FSDP had gathered may still stand in their places
    chosen = None if parameters is None else {id(p) for p in parameters()}
    parts = _parts(model, chosen)
    try:
        for part in parts:
            part.gather()
        yield
    finally:
        for part in parts:
            part.deal_out()


@dataclass(eq=False)
class _Part:
    """A parameter that is dealt out, and everywhere that the model has it."""

    parameter: DTensor
    places: list[tuple[nn.Module, str]]
    values: nn.Parameter | None = None

    def gather(self) -> None:
        """Put the parameter whole in its places."""
        values = full(self.parameter)
        self.values = nn.Parameter(
            values.clone() if _is_whole(self.parameter) else values, self.parameter.requires_grad
        )
        for module, name in self.places:
            module._parameters[name] = self.values

    def deal_out(self) -> None:
        """Put the parameter back as it is dealt out, with the values that it has now."""
        from torch.distributed.tensor import distribute_tensor

        if self.values is None:
            return
        mesh, placements = self.parameter.device_mesh, self.parameter.placements
        with torch.no_grad():
            mine = distribute_tensor(self.values.detach(), mesh, placements, src_data_rank=None)
            self.parameter.to_local().copy_(mine.to_local())
        for module, name in self.places:
            module._parameters[name] = self.parameter  # type: ignore[assignment]


def _parts(model: nn.Module, chosen: Collection[int] | None) -> list[_Part]:
    """Return the parameters that are dealt out, of those chosen by identity. Raises AdapterError for ways that are not known."""
    parts: dict[int, _Part] = {}
    names: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if is_part(parameter) and (chosen is None or id(parameter) in chosen):
                parameter_: Any = parameter
                parts.setdefault(id(parameter), _Part(parameter_, [])).places.append((module, name))
                names.setdefault(id(parameter), f"{module_name}.{name}")
    if odd := [names[key] for key, part in parts.items() if not _is_known(part.parameter)]:
        raise AdapterError(
            f"These weights are dealt out over processes in another way than fully_shard's: {shown(odd)}. Load the model whole, "
            "or dealt out by torch's fully_shard alone."
        )
    return list(parts.values())


def _is_known(parameter: DTensor) -> bool:
    return all(type(placement).__name__ in ("Shard", "Replicate") for placement in parameter.placements)


def _is_whole(parameter: DTensor) -> bool:
    """Return whether every process has all values, so that a gathered tensor may be the parameter's own memory."""
    return parameter.to_local().numel() == parameter.numel()


def _dealt_modules(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that `fully_shard` was called on."""
    types = sys.modules.get("torch.distributed.fsdp")
    if types is not None:
        yield from (module for module in model.modules() if isinstance(module, types.FSDPModule))


# --- a model whose blocks are dealt out ---------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that hold most of a model's weights, which it calls one after the other: those of its outermost lists of
    modules that compute."""
    stacks: list[nn.ModuleList] = []
    waiting = [model]
    while waiting:
        module = waiting.pop(0)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(map(_is_container, module)):
            stacks.append(module)
        else:
            waiting += module.children()
    blocks = [block for stack in stacks for block in stack if any(True for _ in block.parameters())]
    return list(dict.fromkeys(blocks))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def deal_out(model: nn.Module, trained: Iterable[nn.Parameter], device: torch.device) -> None:
    """Deal the weights of a model's blocks out over all processes; what is trained, and what lies outside of blocks, stays whole.

    A block's weights are gathered before it computes, forward or backward, and let go after it.

    Args:
        model: with its weights whole in each process.
        trained: parameters that change, whose gradients the caller sums.
        device: of the weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks, mesh = blocks_of(model), init_device_mesh(device.type, (dist.get_world_size(),))
    keep = {*trained, *_in_several(model, blocks)}
    body = _around(model, blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=keep)
    dealt = {id(p) for block in blocks for p in block.parameters()}
    # Around them, so that the next block's weights can be on their way while one computes
    fully_shard(body, mesh=mesh, ignored_params=keep | {p for p in body.parameters() if id(p) not in dealt})
    if device.type == "cpu":
        _give_back_large_pieces()
        for parameter in model.parameters():
            if not is_part(parameter):  # a view of a file's mapping, all of which would stay in memory for it
                parameter.data = parameter.data.clone()


def _give_back_large_pieces() -> None:
    """Let the C library map pieces of a megabyte and more by themselves, where it is glibc.

    Weights that are gathered and let go between activations leave holes in its heap, which took as much memory as the base.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)


def bytes_here(model: nn.Module) -> int:
    """Return the bytes that this process holds of a model whose blocks are dealt out, with one block gathered to compute."""
    here = sum(_local(p).numel() * p.element_size() for p in model.parameters())
    gathered = [
        sum((p.numel() - _local(p).numel()) * p.element_size() for p in block.parameters())
        for block in blocks_of(model)
    ]
    return here + max(gathered, default=0)


def _local(parameter: nn.Parameter) -> Tensor:
    part: Any = parameter
    local: Tensor = part.to_local() if is_part(parameter) else parameter
    return local


def _in_several(model: nn.Module, blocks: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Return parameters that more than one block has, or something outside of blocks."""
    counts = Counter(parameter for block in blocks for parameter in set(block.parameters()))
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = {p for m in model.modules() if id(m) not in inside for p in m._parameters.values() if p is not None}
    return {parameter for parameter, count in counts.items() if count > 1} | (outside & counts.keys())


def _around(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    """Return the innermost module that calls all blocks, the model itself if need be. (A list of modules calls none.)"""
    body, wanted = model, {id(block) for block in blocks}
    while True:
        inner = [m for m in body.children() if wanted <= {id(part) for part in m.modules()}]
        if not inner or _is_container(inner[0]):
            return body
        body = inner[0]
