"""DoRA (Liu et al. 2024, arXiv 2402.09353, §4): W' = m·(W0 + ΔW) / ‖W0 + ΔW‖ by rows, ΔW = (α/r)·BA. LoRA's settings, and a
trained magnitude m for each output of a layer, ‖W0‖ at the start. Knows how its settings become updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaw.errors import ConfigError, TargetError
from deltaw.methods.lora import LoRA
from deltaw.methods.plan import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltaw.layers.kinds import Weight
    from deltaw.methods.lora import Slices
    from deltaw.methods.updates.base import Update
    from deltaw.methods.updates.lowrank import LowRank


@register("dora", lr=1.5e-3)
@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: W' = m·(W0 + ΔW) / ‖W0 + ΔW‖ row by row (Liu et al. 2024, arXiv 2402.09353, §4).

    Trains A [r, k] and B [d, r] of each layer as `LoRA` does, and its magnitude m [d], which starts at ‖W0‖.

    Its settings are those of LoRA, without the init pissa and without slices of layers.

    Raises:
        ConfigError: A setting is out of range, or init is "pissa".

    Example:
        >>> import deltaw
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("model")
        >>> model = deltaw.attach(model, deltaw.DoRA(rank=4, targets="q"))
        >>> {n.rpartition(".")[2]: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        {'A': (4, 32), 'B': (32, 4), 'magnitude': (32,)}
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "pissa":
            raise ConfigError(
                "DoRA has no pissa start: its norms are those of W0 + BA, and pissa's BA is taken off W0. Use init gaussian or "
                "kaiming, or LoRA."
            )

    def update(self, layer: nn.Module, A: Tensor, B: Tensor, scale: float, slices: Slices) -> Update:
        """Return the update of a layer that starts from this A and B. Raises TargetError for slices of one."""
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
        """Raise TargetError: DoRA has no form for weights without a layer."""
        raise TargetError(
            f"DoRA has no form for {weight.name} of a {type(weight.module).__name__}, a weight without a layer of its own: use "
            "LoRA."
        )
