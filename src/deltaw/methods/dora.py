"""DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m·(W0 + ΔW) / ‖W0 + ΔW‖ by rows, ΔW = (α/r)·BA. LoRA's settings, and a trained
magnitude m for each output of a layer, ‖W0‖ at the start. Knows how its settings become updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaw.errors import TargetError
from deltaw.methods.lora import LoRA

if TYPE_CHECKING:
    from torch import Tensor

    from deltaw.layers import Kind
    from deltaw.slices import Runs
    from deltaw.updates import Update


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation."""

    def update(self, layer: Any, kind: type[Kind], A: Tensor, B: Tensor, scale: float) -> Update:
        from deltaw.updates import LowRankRescaled, row_norms

        magnitude = row_norms(kind.W0(layer).detach(), A, B, scale).to(A.dtype)
        return LowRankRescaled(kind, A, B, scale, magnitude, self.dropout)

    def sliced(
        self, kind: type[Kind], A: Tensor, B_rows: Tensor, scale: float, slices: Mapping[str, Runs], d: int
    ) -> Update:
        raise TargetError(
            f"DoRA rescales whole layers: it has no form for slices of one ({', '.join(slices)}). Name the layer itself, or use "
            "LoRA."
        )
