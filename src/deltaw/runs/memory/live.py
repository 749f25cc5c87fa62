"""Bytes of the tensors that are alive while code runs, and the FLOPs of its products. Knows tensors; nothing of models.

On the meta device tensors have shapes and no memory, and autograd saves and frees them as it would anywhere. A pass there says
what a real one holds, for the price of its bookkeeping.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Function = Callable[..., object]
Operator = torch._ops.OpOverloadPacket[..., object]


_ATEN = torch.ops.aten
# torch's own table has the GPU's kernels, and lacks the operators that work in place
_REGISTRY: dict[Operator, Callable[..., int]] = dict(flop_registry) | {
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
}
# Of shapes: query, key, value; in the backward pass the gradient before them
_CPU_ATTENTION: dict[Operator, tuple[Callable[..., int], int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: (sdpa_flop_count, 3),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (sdpa_backward_flop_count, 4),
}


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts, within the block, the bytes of new tensors (`now`), their highest sum (`peak`) and FLOPs.

    A multiplication and an addition are two FLOPs. Tensors that are `there` already are not counted, nor is memory that a
    kernel takes and returns within one operation.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.now = self.peak = self.flops = 0
        self.sizes: dict[int, int] = {}
        for tensor in there:
            self._count(tensor.untyped_storage(), 0)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = kwargs or {}
        if func is _ATEN._local_scalar_dense.default and isinstance(args[0], Tensor) and args[0].is_meta:
            return _answer(args[0].dtype)
        out = func(*args, **named)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._count(storage, storage.nbytes())
        operator = func._overloadpacket
        if operator in _CPU_ATTENTION:
            count, tensors = _CPU_ATTENTION[operator]
            self.flops += count(*(a.shape for a in args[:tensors] if isinstance(a, Tensor)))
        elif operator in _REGISTRY:
            self.flops += _REGISTRY[operator](*args, **named, out_val=out)
        return out

    def since(self) -> int:
        """Return `now`, and count the peak from it."""
        self.peak = self.now
        return self.now

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _answer(dtype: torch.dtype) -> bool | int | float:
    """Return what a meta tensor says when code asks for its value. A mask answers "not all True": rows are padded."""
    return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


class StandIns(TorchFunctionMode):
    """Lets attention and dropout of meta tensors, in this thread and block, save what they save on `device` (cpu or cuda).

    torch chooses a kernel by the device of the tensors, and the one for meta tensors saves something else. All other
    functions and tensors are computed as usual.

    Start a backward pass inside from a gradient edge, not from a tensor. torch hands backward(tensor) to this mode and closes
    the mode meanwhile, so that recomputed (checkpointed) blocks would miss it.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.on_gpu = device != "cpu"

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is F.scaled_dot_product_attention:
                func = _gpu_attention if self.on_gpu else _cpu_attention
            elif func is F.dropout and self.on_gpu:
                func = _gpu_dropout
        return func(*args, **kwargs or {})


def _cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The CPU's fused kernel, where torch takes it there: without dropout, and with a mask that is not trained."""
    if dropout_p or (attn_mask is not None and attn_mask.requires_grad):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _fused(query, key, value, attn_mask, is_causal, scale)


def _gpu_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """A GPU's fused kernels. They know dropout, and train a mask without another copy of it."""
    if attn_mask is not None and attn_mask.requires_grad:
        attn_mask = attn_mask.detach()
    return _fused(query, key, value, attn_mask, is_causal, scale)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Attention that saves query, key, value, mask, output and one number a row."""
    if mask is not None and mask.dtype == torch.bool:  # torch converts it in each call too
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    kernel: Callable[..., tuple[Tensor, Tensor]] = _ATEN._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]


def _gpu_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that saves one byte an entry, as a GPU's; a CPU's saves the factor itself."""
    if not training or p == 0.0:
        return input
    return torch.native_dropout(input, p, True)[0]
