"""W0 + scale·BA of a stack of matrices [E, d, k], without forming the sum.

It stands in for a mixture's experts in their forward and computes products with tokens by the branch. Knows tensors only.

A forward indexes the stack by expert, transposes it, and multiplies tokens by it: one expert at a time, gathered, or grouped.
These operations are computed as x·W0 + scale·(x·left)·right, with gradients of A's and B's sizes. For any other operation the
sum is formed, of as much of the stack as the operation has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from deltaw.layers.ops.linear import lowrank_linear


class Unformed(Tensor):
    """W0 + scale·left·right: W0 [E, m, n], left [E, m, r], right [E, r, n], or the same without E. It is a tensor to whoever asks
    for shape, dtype or device, and has no storage of its own."""

    W0: Tensor
    left: Tensor
    right: Tensor
    scale: float
    fast: bool
    """Branches are added in the faster rounding order (`linear.lowrank_linear`'s `training`)."""

    @staticmethod
    def __new__(cls, W0: Tensor, left: Tensor, right: Tensor, scale: float, *, fast: bool) -> Unformed:
        shapes: Unformed = Tensor._make_wrapper_subclass(
            cls, W0.shape, strides=W0.stride(), dtype=W0.dtype, device=W0.device
        )
        return shapes

    def __init__(self, W0: Tensor, left: Tensor, right: Tensor, scale: float, *, fast: bool) -> None:
        vars(self).update(W0=W0, left=left, right=right, scale=scale, fast=fast, singly=None)

    def formed(self) -> Tensor:
        """Return the sum, in W0's shape and dtype."""
        add = torch.baddbmm if self.W0.ndim == 3 else torch.addmm
        return add(self.W0, self.left, self.right, alpha=self.scale)

    def like(self, W0: Tensor, left: Tensor, right: Tensor) -> Unformed:
        return Unformed(W0, left, right, self.scale, fast=self.fast)

    def of(self, e: int) -> Unformed:
        """Return the `e`th matrix. All experts' factors come of one operation, so that one operation collects their gradients."""
        if vars(self)["singly"] is None:
            vars(self)["singly"] = self.left.unbind(), self.right.unbind()
        lefts, rights = vars(self)["singly"]
        return self.like(self.W0[e], lefts[e], rights[e])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:  # fmt: skip
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None and _takes(rule, args, kwargs) and (out := rule(*args, **kwargs)) is not None:
            return out
        if func in _ASKED:
            first, *others = args
            assert isinstance(first, Unformed)
            return func(first.W0, *others, **kwargs)
        args, kwargs = tree_map_only(Unformed, Unformed.formed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., object], types: object, args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:  # fmt: skip
        args, kwargs = tree_map_only(Unformed, Unformed.formed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _takes(rule: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Tell if a rule takes these arguments. PyTorch gives them names of its own; with these the sum is formed."""
    try:
        return not kwargs or inspect.signature(rule).bind(*args, **kwargs) is not None
    except TypeError:
        return False


# --- products ---------------------------------------------------------------------------------------------------


def _linear(x: Tensor, P: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Compute xPᵀ + bias for x [..., n], P [m, n] → [..., m]."""
    if isinstance(x, Unformed) or not isinstance(P, Unformed) or P.W0.ndim != 2 or isinstance(bias, Unformed):
        return None
    return lowrank_linear(x, P.W0, bias, P.right, P.left, P.scale, training=P.fast)


def _matmul(x: Tensor, P: Tensor) -> Tensor | None:
    """Compute xP for x [..., m], P [m, n] → [..., n]; and products of stacks."""
    if isinstance(P, Unformed) and not isinstance(x, Unformed) and P.W0.ndim == 2:
        return _linear(x, _transposed(P))
    return _bmm(x, P) if x.ndim == P.ndim == 3 and len(x) == len(P) else None


def _rmatmul(P: Tensor, x: Tensor) -> Tensor | None:
    return _matmul(x, P)


def _bmm(x: Tensor, y: Tensor) -> Tensor | None:
    """Compute xy for x [E, t, m], y [E, m, n] → [E, t, n], one of which is not formed."""
    if isinstance(x, Unformed) and isinstance(y, Unformed):
        return None
    if isinstance(y, Unformed):
        return torch.baddbmm(torch.bmm(x, y.W0), torch.bmm(x, y.left), y.right, alpha=y.scale)
    assert isinstance(x, Unformed)
    return torch.baddbmm(torch.bmm(x.W0, y), x.left, torch.bmm(x.right, y), alpha=x.scale)


def _grouped(x: Tensor, P: Tensor, *, offs: Tensor | None = None, **others: object) -> Tensor | None:
    """Compute each token's product with its expert: x [S, m], those of expert e up to offs[e], P [E, m, n] → [S, n]."""
    if isinstance(x, Unformed) or any(value is not None for value in others.values()):
        return None
    assert isinstance(P, Unformed)
    if offs is None or x.ndim != 2 or P.W0.ndim != 3:
        return _bmm(x, P) if offs is None and x.ndim == P.W0.ndim == 3 else None
    if x.device.type != "cpu":
        return grouped_by_kernel(x, P, offs)
    with torch.autocast("cpu", enabled=False):  # which the operation itself knows nothing of
        out: Tensor = _Grouped.apply(x, P.W0, P.left, P.right, offs, P.scale)  # type: ignore[no-untyped-call]
        return out


def grouped_by_kernel(x: Tensor, P: Unformed, offs: Tensor) -> Tensor:
    """Compute `_grouped` by three grouped products. Their kernels want rows of whole 16 bytes, so the rank is padded with
    zeros."""
    more = -P.left.shape[-1] % (16 // x.element_size())
    Ax = F.grouped_mm(x, F.pad(P.left, (0, more)), offs=offs)
    BAx = F.grouped_mm(Ax, F.pad(P.right, (0, 0, 0, more)), offs=offs)
    return torch.add(F.grouped_mm(x, P.W0, offs=offs), BAx, alpha=P.scale)


class _Grouped(torch.autograd.Function):
    """The same on a CPU, where a grouped product is one product after the other: each expert's branch is added while its tokens
    are in cache. What is saved is x and x·left. Branches are computed in fp32 at least: in less, a CPU's products of this shape
    are slower, and it keeps a kernel for each number of tokens."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, W0: Tensor, left: Tensor, right: Tensor, offs: Tensor, scale: float) -> Tensor:
        spans, wide = _spans(offs), torch.promote_types(x.dtype, torch.float32)
        full = bool(spans) and spans[-1][1].stop == len(x)
        out = x.new_empty(len(x), W0.shape[-1]) if full else x.new_zeros(len(x), W0.shape[-1])
        Ax = x.new_empty(len(x), left.shape[-1], dtype=wide)
        for e, rows in spans:
            torch.mm(x[rows], W0[e], out=out[rows])
            a = torch.mm(x[rows].to(wide), left[e].to(wide), out=Ax[rows])
            _add_product(out[rows], a, right[e].to(wide), scale)
        ctx.save_for_backward(x, Ax, W0, left, right)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, Ax, W0, left, right = ctx.saved_tensors
        scale, wide = ctx.scale, Ax.dtype
        needs_x, _, needs_left, needs_right = ctx.needs_input_grad[:4]
        dx, dleft, dright = torch.zeros_like(x), torch.zeros_like(left.mT), torch.zeros_like(right)
        for e, rows in ctx.spans:
            part = g[rows].to(wide)
            back = (part @ right[e].to(wide).t()).mul_(scale)
            if needs_right:
                dright[e] = (Ax[rows].t() @ part).mul_(scale)
            if needs_left:  # by its transpose: twice as fast where r is small
                dleft[e] = back.t() @ x[rows].to(wide)
            if needs_x:
                torch.mm(g[rows], W0[e].t(), out=dx[rows])
                _add_product(dx[rows], back, left[e].to(wide).t(), 1.0)
        dleft = dleft.mT
        return dx if needs_x else None, None, dleft if needs_left else None, dright if needs_right else None, None, None


def _add_product(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Add scale·ab to `out`, in place and rounded once."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, alpha=scale)
    else:
        out.add_(a @ b, alpha=scale)


def _spans(offs: Tensor) -> list[tuple[int, slice]]:
    """Return each expert that has tokens, and their rows."""
    ends = offs.tolist()
    return [(e, slice(start, end)) for e, (start, end) in enumerate(pairwise([0, *ends])) if start < end]


# --- views ------------------------------------------------------------------------------------------------------


def _item(P: Unformed, index: object) -> Tensor | None:
    """Return one expert's matrix, or some experts'."""
    if P.W0.ndim != 3 or isinstance(index, bool):
        return None
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.dtype in (torch.bool, torch.uint8) or index.ndim > 1:
            return None
        if index.ndim == 0:
            return P.of(int(index))
    elif isinstance(index, int):
        return P.of(index)
    elif not isinstance(index, slice):
        return None
    return P.like(P.W0[index], P.left[index], P.right[index])


def _transposed(P: Unformed) -> Unformed:
    return P.like(P.W0.mT, P.right.mT, P.left.mT)


def _transpose(P: Unformed, first: int, second: int) -> Tensor | None:
    n = P.W0.ndim
    last_two = {first % n, second % n} == {n - 2, n - 1}
    return _transposed(P) if last_two else None


def _t(P: Unformed) -> Tensor | None:
    return _transposed(P) if P.W0.ndim == 2 else None


def _casting(func: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def cast(P: Unformed, *args: object, **kwargs: object) -> Tensor | None:
        if any(isinstance(value, Unformed) for value in (*args, *kwargs.values())):
            return None
        return P.like(*(func(part, *args, **kwargs) for part in (P.W0, P.left, P.right)))

    return cast


def _attributes(*names: str) -> Sequence[object]:
    return [getattr(Tensor, name).__get__ for name in names]


_ASKED = {
    Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.data_ptr,
    Tensor.is_contiguous, Tensor.__len__, Tensor.get_device,
    *_attributes("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "is_meta"),
}  # fmt: skip
"""Functions that W0 answers."""
_MT, _T = _attributes("mT", "T")
_RULES: dict[object, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    Tensor.__rmatmul__: _rmatmul,
    **dict.fromkeys((torch.bmm, Tensor.bmm), _bmm),
    **dict.fromkeys((F.grouped_mm, torch._grouped_mm), _grouped),
    Tensor.__getitem__: _item,
    **dict.fromkeys((torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes), _transpose),
    _MT: _transposed,
    **dict.fromkeys((_T, torch.t, Tensor.t), _t),
    **{func: _casting(func) for func in (Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to)},
}
"""Operation → what computes it without forming the sum; None where it cannot."""
