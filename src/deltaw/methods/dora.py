"""DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m·(W0 + ΔW) / ‖W0 + ΔW‖ by rows, ΔW = (α/r)·BA. LoRA's settings, and a trained
magnitude m for each output of a layer, ‖W0‖ at the start. Knows how its settings become updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaw.errors import ConfigError, TargetError
from deltaw.methods.lora import LoRA

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltaw.layers.kinds import Weight
    from deltaw.methods.lora import Slices
    from deltaw.methods.updates.base import Update
    from deltaw.methods.updates.lowrank import LowRank


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "pissa":
            raise ConfigError(
                "DoRA has no pissa start: its norms are those of W0 + BA, and pissa's BA is taken off W0. Use init gaussian or "
                "kaiming, or LoRA."
            )

    def update(self, layer: nn.Module, A: Tensor, B: Tensor, scale: float, slices: Slices) -> Update:
        from deltaw.layers.kinds import kind_of, padding_token
        from deltaw.methods.updates.dora import LowRankRescaled, row_norms

        if slices:
            raise TargetError(
                f"DoRA rescales whole layers: it has no form for slices of one ({', '.join(slices)}). Name the layer itself, or "
                "use LoRA."
            )
        kind = kind_of(layer)
        assert kind is not None
        padding = padding_token(layer)
        if padding is not None and bool(kind.W0(layer)[:, padding].any()):
            raise TargetError(
                f"DoRA rescales every row of an embedding, and the row of its padding token ({padding}) is not zero: it would "
                "change, though PyTorch trains no such row. Use LoRA for embeddings."
            )
        magnitude = row_norms(kind.W0(layer).detach(), A, B, scale).to(A.dtype)
        return LowRankRescaled(kind, A, B, scale, magnitude, self.dropout)

    def on_weight(self, weight: Weight, A: Tensor, B: Tensor, scale: float, slices: Slices) -> LowRank:
        raise TargetError(
            f"DoRA has no form for {weight.own} of a {type(weight.module).__name__}, a weight without a layer of its own: use "
            "LoRA."
        )
