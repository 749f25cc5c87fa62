"""LoRA (Hu et al. 2021, arXiv 2106.09685): ΔW = (α/r)·BA, A Gaussian and B zero at the start. Knows how its settings
become updates; reads the model only through targets.py and layers.py. Imports torch only when a plan is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deltaw.config import ABOVE_ZERO, BELOW_ONE, check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltaw.attached import Plan
    from deltaw.layers import Kind
    from deltaw.slices import Runs
    from deltaw.updates import Update


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation: h = W0x + (α/r)·BAx."""

    rank: int = 8
    """r of every targeted layer, where targets gives none of its own."""
    alpha: float | None = None
    """α; the branch is scaled by α/r. Default: the rank of each layer, a scale of 1."""
    targets: str | Sequence[str] | Mapping[str, int] = "all-linear"
    """Which layers: all-linear, qv, attention, mlp; roles q k v o up gate down; names or globs; several with commas; slices of a
    fused layer, c_attn[q,v]; attention=8,mlp=4 sets ranks."""
    dropout: float = 0.0
    """Probability of zeroing an entry of the branch's input in training."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """Start of A: gaussian (the paper's) or kaiming (uniform; loralib's and PEFT's)."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """The paper's α/r, or rank-stabilised α/√r (rsLoRA)."""
    whole: str | Sequence[str] = ""
    """Modules to train whole beside the update, by names or globs, several with commas: lm_head, embed_tokens, score. A weight
    that the model ties stays tied."""
    tokens: str | Sequence[int] = ""
    """Tokens (their ids, several with commas) whose rows of the embedding are trained, and of a head that is tied to it; the
    file then holds these rows alone."""

    def __post_init__(self) -> None:
        check(self, rank=(1, None), alpha=(ABOVE_ZERO, None), dropout=(0.0, BELOW_ONE))

    def scale(self, rank: int) -> float:
        """The factor of BA on a layer of this rank."""
        alpha = rank if self.alpha is None else self.alpha
        return alpha / rank if self.scaling == "alpha/r" else alpha / rank**0.5

    def plan(self, model: nn.Module) -> Plan:
        """An update for each targeted layer: A drawn from torch's global generator in layer order, B zero, both
        float32 on the layer's device (float64 on a float64 base). Raises TargetError."""
        import torch

        from deltaw.attached import Plan, base_modules
        from deltaw.layers import kind_of, shape
        from deltaw.targets import select
        from deltaw.updates import INITS
        from deltaw.wholes import with_wholes

        selection = select(model, self.targets, self.rank)
        updates: dict[str, Update] = {}
        for name, rank in selection.ranks.items():
            layer: Any = model.get_submodule(name)
            kind = kind_of(layer)
            assert kind is not None
            d, k = shape(layer)
            device = layer.weight.device
            dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
            slices = selection.slices.get(name, {})
            rows = sum(stop - start for runs in slices.values() for start, stop in runs) if slices else d
            A = torch.cat([INITS[self.init](rank, k, device, dtype) for _ in slices or (name,)])
            B = torch.zeros(rows, rank, device=device, dtype=dtype)
            if slices:
                updates[name] = self.sliced(kind, A, B, self.scale(rank), slices, d)
            else:
                updates[name] = self.update(layer, kind, A, B, self.scale(rank))
        left_out = dict(selection.left_out)
        for name, update in with_wholes(dict(base_modules(model)), self.whole, self.tokens, updates).items():
            updates[name] = update
            left_out.pop(name, None)
        return Plan(updates, left_out)

    def update(self, layer: Any, kind: type[Kind], A: Tensor, B: Tensor, scale: float) -> Update:
        """The update that these become on a layer."""
        from deltaw.updates import LowRank

        return LowRank(kind, A, B, scale, self.dropout)

    def sliced(
        self, kind: type[Kind], A: Tensor, B_rows: Tensor, scale: float, slices: Mapping[str, Runs], d: int
    ) -> Update:
        """The update that these become on some slices of a layer with d outputs."""
        from deltaw.updates import Sliced

        return Sliced(kind, A, B_rows, scale, slices, d, self.dropout)
