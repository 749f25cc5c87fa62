"""DoRA's update of one layer: W' = m·(W0 + ΔW) / ‖W0 + ΔW‖ by rows (Liu et al. 2024, arXiv 2402.09353)."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from deltaw.layers.kinds import Kind, as_stored
from deltaw.layers.ops.merging import Change, Product, Rescaled
from deltaw.layers.patch import slot_of
from deltaw.methods.updates.lowrank import LowRank, plus

# Entries of W0 that are widened at once
_WIDENED = 1 << 22


class LowRankRescaled(LowRank):
    """W' = m·(W0 + scale·BA) / ‖W0 + scale·BA‖, row by row, with a trained magnitude m [d] (Liu et al. 2024, arXiv 2402.09353).

    As in the paper (§4.3), no gradient flows through the norm.
    """

    def __init__(
        self, kind: Kind, A: Tensor, B: Tensor, scale: float, magnitude: Tensor, dropout: float = 0.0,
        bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(kind, A, B, scale, dropout, bias)
        self.magnitude = nn.Parameter(magnitude)

    def alone(self, layer: nn.Module, x: Tensor) -> Tensor:
        out = self._sum(layer, x, None)
        out = (out * self.kind.per_output(layer, self.magnitude / self.norm(layer))).to(out.dtype)
        bias = layer._parameters.get("bias") if self.bias is None else self.bias
        return out if bias is None else plus(out, self.kind.per_output(layer, bias))

    def parameter(self, layer: nn.Module, own_name: str) -> Tensor | None:
        if own_name != "weight":
            return super().parameter(layer, own_name)
        W0 = self.W0(layer)
        return as_stored(layer, own_name, self.weight(W0) * (self.magnitude / self.norm(layer)).to(W0.dtype)[:, None])

    @torch.no_grad()
    def norm(self, layer: nn.Module) -> Tensor:
        """Return ‖W0 + scale·BA‖ by rows, [d] in fp32 or wider.

        It is computed again in each pass, and once in a `generate`. A cache could go stale: PyTorch's count of a tensor's
        changes misses some writers (`.data`, an optimizer in C).
        """
        slot = slot_of(layer)
        kept = None if slot is None else slot.route.kept()
        norm = None if kept is None else kept.get(("norm", id(self)))
        if norm is None:
            norm = row_norms(self.W0(layer), self.A, self.B, self.scale)
            if kept is not None:
                kept["norm", id(self)] = norm
        return norm

    @property
    def exact_product(self) -> Product | None:
        return None  # the rescaled ΔW has any rank

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        return super().changes(layer) | {"weight": Rescaled(self.product, self.magnitude)}

    def other_shape(self, layer: nn.Module) -> str | None:
        if why := super().other_shape(layer):
            return why
        d = self.B.shape[0]
        return None if self.magnitude.shape == (d,) else f"its magnitude is {list(self.magnitude.shape)}, not [{d}]"


def row_norms(W0: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return ‖W0 + scale·BA‖ by rows, [d] in fp32 or wider, also under autocast.

    W0 is [d, k], A [r, k], B [d, r]. The sum is never formed: ‖w‖² + 2s⟨w, bA⟩ + s²‖bA‖² takes O(d·k·r).
    """
    wide = torch.promote_types(W0.dtype, torch.float32)
    device = W0.device.type
    with contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        A, B = A.to(wide), B.to(wide) * scale
        squares = ((B @ (A @ A.t())) * B).sum(1)
        height = W0.shape[0] if W0.dtype == wide else max(1, _WIDENED // W0.shape[1])
        parts = []
        for rows, b in zip(torch.split(W0, height), torch.split(B, height), strict=True):
            w = rows.to(wide)
            parts.append(torch.linalg.vector_norm(w, dim=1).square() + 2 * ((w @ A.t()) * b).sum(1))
        return (squares + torch.cat(parts)).clamp_min(0).sqrt()
