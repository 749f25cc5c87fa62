"""Bytes of the tensors that are alive while code runs, and the FLOPs of its products. Knows tensors; nothing of models.

On the meta device tensors have shapes and no memory, and autograd saves and frees them as it would anywhere: a pass there says
what a real one holds, for the price of its bookkeeping.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention_flops(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_ATEN = torch.ops.aten
# torch's own table is of the GPU's kernels, and without those that work in place
_REGISTRY: dict[Any, Callable[..., int]] = dict(flop_registry) | {
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
}
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class Live(TorchDispatchMode):
    """While open, counts the bytes of tensors that come to be (`now`), the most of them at once (`peak`), and FLOPs, a
    multiplication and an addition as two. The tensors `there` before are not counted, nor is memory that a kernel takes and
    gives back inside one operation."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.sizes: dict[int, int] = {}
        for tensor in there:
            self._came(tensor.untyped_storage(), 0)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return _answer(args[0].dtype)
        out = func(*args, **named)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._came(storage, storage.nbytes())
        kind = func._overloadpacket
        if kind in _CPU_ATTENTION:
            self.flops += _CPU_ATTENTION[kind](*(getattr(a, "shape", a) for a in args))
        elif kind in _REGISTRY:
            self.flops += _REGISTRY[kind](*args, **named, out_val=out)
        return out

    def since(self) -> int:
        """`now`, from which a new peak counts."""
        self.peak = self.now
        return self.now

    def _came(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._went, key)

    def _went(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _answer(dtype: torch.dtype) -> bool | int | float:
    """What a meta tensor that is asked for its value says. A mask that is asked whether all is True says no: rows are padded."""
    return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


# Of functions that stand in for torch's, one set at a time
_ONE = threading.RLock()


class StandIns:
    """While open, attention and dropout of meta tensors save what they do on a device of this type, whose kernels torch would not
    choose for meta tensors. (They take the functions' places: a mode of torch's does not reach what checkpointing recomputes.)"""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"

    def __enter__(self) -> None:
        _ONE.acquire()
        self.own = F.scaled_dot_product_attention, F.dropout
        F.scaled_dot_product_attention, F.dropout = self._attention_of_any, self._dropout_of_any  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        F.scaled_dot_product_attention, F.dropout = self.own
        _ONE.release()

    def _attention_of_any(self, query: Tensor, *others: Any, **named: Any) -> Tensor:
        attention = self._attention if query.is_meta else self.own[0]
        return attention(query, *others, **named)

    def _dropout_of_any(self, input: Tensor, *others: Any, **named: Any) -> Tensor:
        dropout = _gpu_dropout if input.is_meta and self.on_gpu else self.own[1]
        return dropout(input, *others, **named)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """The fused kernels save query, key, value, mask, output and a number for each row; a CPU's knows no dropout."""
        if dropout_p and not self.on_gpu:
            return self.own[0](query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # as the function itself does, in each call
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
        fused: Any = _ATEN._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return out


def _gpu_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """A GPU's saves a byte an entry, a CPU's the factor itself."""
    if not training or p == 0.0:
        return input
    return torch.native_dropout(input, p, True)[0]
