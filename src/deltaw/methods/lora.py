"""LoRA (Hu et al. 2021, arXiv 2106.09685, §4.1): ΔW = (α/r)·BA, A Gaussian and B zero at the start. Knows how its settings
become updates. Imports torch only when a plan is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deltaw.config import ABOVE_ZERO, BELOW_ONE, check
from deltaw.errors import ConfigError
from deltaw.methods.plan import Plan, Preset, register
from deltaw.methods.shared import Beside

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltaw.layers.kinds import Runs, Weight
    from deltaw.methods.targets import Layer
    from deltaw.methods.updates.base import Update
    from deltaw.methods.updates.lowrank import LowRank

    Slices = Mapping[str, Runs]


# Scales that float32 still has all bits for
_SMALLEST, _LARGEST = 1e-30, 1e30


@register("lora", lr=1.5e-3, presets={"lora-qv": Preset(lr=3e-3, settings={"targets": "qv"})})
@dataclass(frozen=True)
class LoRA(Beside):
    """Low-rank adaptation: h = W0x + (α/r)·BAx (Hu et al. 2021, arXiv 2106.09685, §4.1).

    Trains A [r, k] and B [d, r] of each layer with a weight W0 [d, k]; BA is zero at the start.

    Raises:
        ConfigError: A setting is out of range.

    Example:
        >>> import deltaw
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("model")
        >>> model = deltaw.attach(model, deltaw.LoRA(rank=4, alpha=8, targets="q,v"))
        >>> adapter = deltaw.summary(model).adapters["default"]
        >>> adapter.parameters  # of 2 blocks: 4·(32 + 32) for q, 4·(32 + 16) for v
        896
    """

    rank: int = 8
    """r of every targeted layer, at least 1, where targets gives none of its own. (In the paper's §7.2, 1 to 8 suffice for
    GPT-3.)"""
    alpha: float | None = None
    """α, above 0: the branch is scaled by α/r (§4.1). Default: each layer's rank."""
    targets: str | Sequence[str] | Mapping[str, int] = "all-linear"
    """Layers to adapt, with commas: all-linear, qv, attention, mlp, roles (q k v o up gate down), names or globs. Slices of a
    fused layer are c_attn[q,v]; attention=8,mlp=4 sets ranks. In Python also a list, or a mapping of these to ranks."""
    dropout: float = 0.0
    """Probability of zeroing an entry of the branch's input in training. From 0 to below 1."""
    init: Literal["gaussian", "kaiming", "pissa"] = "gaussian"
    """Start of A: gaussian (the paper's §4.1), kaiming (uniform; loralib's and PEFT's) or pissa; B is zero. With pissa A and
    B start at the r largest singular triples of W0 (Meng et al. 2024, arXiv 2404.02948), taken off again so that ΔW is zero;
    the file has twice the rank."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """Factor of BA: the paper's α/r (§4.1), or rank-stabilised α/√r. (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.)"""

    def __post_init__(self) -> None:
        check(self, rank=(1, None), alpha=(ABOVE_ZERO, _LARGEST), dropout=(0.0, BELOW_ONE))

    def scale(self, rank: int) -> float:
        """Return the factor of BA on a layer of this rank. Raises ConfigError where float32 has no such number."""
        alpha = rank if self.alpha is None else self.alpha
        scale = alpha / rank if self.scaling == "alpha/r" else alpha / rank**0.5
        if scale < _SMALLEST:
            raise ConfigError(
                f"alpha is {alpha!r}: with rank {rank} the update would be scaled by {scale:g}, by nothing."
            )
        return scale

    def plan(self, model: nn.Module) -> Plan:
        """Return an update for each targeted layer, float32 on the layer's device (float64 on a float64 base).

        A is drawn from torch's global generator in the layers' order, B is zero. Raises TargetError where `targets` does not fit
        the model, and for layers that have no form of these settings.
        """
        from deltaw.layers.kinds import Weight
        from deltaw.methods.targets import select
        from deltaw.methods.updates.weights import put_on_weight

        selection = select(model, self.targets, self.rank, without=self.trained_whole(model))
        self._check_dropout(model, selection.ranks)
        updates: dict[str, Update] = {}
        for name, rank in selection.ranks.items():
            layer, slices = selection.layers[name], selection.slices.get(name, {})
            A, B = self._start(layer, rank, slices)
            if isinstance(layer, Weight):
                module = name.removesuffix(layer.name).removesuffix(".")
                put_on_weight(updates, module, layer.name, self.on_weight(layer, A, B, self.scale(rank), slices))
            else:
                updates[name] = self.update(layer, A, B, self.scale(rank), slices)
        return self.planned(model, updates, selection.left_out)

    def _check_dropout(self, model: nn.Module, names: Iterable[str]) -> None:
        """Raise TargetError for dropout on an output projection that PyTorch's attention reads without calling it."""
        from torch import nn

        from deltaw.errors import TargetError

        parents = {n: model.get_submodule(n.rpartition(".")[0]) for n in names if n.endswith("out_proj")}
        read = [n for n, parent in parents.items() if isinstance(parent, nn.MultiheadAttention)]
        if self.dropout and read:
            raise TargetError(
                "nn.MultiheadAttention uses the weights of these layers without calling them, so there is no input of a "
                "branch that dropout could act on. Set dropout to 0, or leave them out of targets:",
                read,
            )

    def _start(self, layer: Layer, rank: int, slices: Slices) -> tuple[Tensor, Tensor]:
        """Return A [r, k] and B [d, r]; of n slices [n·r, k] and [Σ rows, r]; of E matrices [E, r, k] and [E, d, r]."""
        import torch

        from deltaw.layers.kinds import Weight, padding_token, shape
        from deltaw.methods.updates.lowrank import INITS

        W0 = layer.value if isinstance(layer, Weight) else layer._parameters["weight"]
        assert W0 is not None
        d, k = shape(layer)
        dtype = torch.float64 if W0.dtype == torch.float64 else torch.float32

        def A() -> Tensor:
            return INITS["gaussian" if self.init == "pissa" else self.init](rank, k, W0.device, dtype)

        if isinstance(layer, Weight) and W0.ndim == 3:
            return torch.stack([A() for _ in W0]), torch.zeros(len(W0), d, rank, device=W0.device, dtype=dtype)
        rows = sum(stop - start for runs in slices.values() for start, stop in runs) if slices else d
        start = torch.cat([A() for _ in slices or (0,)])
        if (padding := padding_token(layer)) is not None:
            start[:, padding] = 0  # no gradient reaches this column, so ΔW stays zero there
        return start, torch.zeros(rows, rank, device=W0.device, dtype=dtype)

    def update(self, layer: nn.Module, A: Tensor, B: Tensor, scale: float, slices: Slices) -> Update:
        """Return the update of a layer, or of some slices of it, that starts from this A and B. Raises TargetError."""
        from deltaw.layers.kinds import kind_of, padding_token, shape
        from deltaw.methods.updates.lowrank import LowRank, Recentred, Sliced

        kind = kind_of(layer)
        assert kind is not None
        if self.init == "pissa":
            start = _principal(kind.W0(layer), A, scale, slices, padding_token(layer))
            return Recentred(kind, *start, scale, self.dropout)
        if slices:
            return Sliced(kind, A, B, scale, slices, shape(layer)[0], self.dropout)
        return LowRank(kind, A, B, scale, self.dropout)

    def on_weight(self, weight: Weight, A: Tensor, B: Tensor, scale: float, slices: Slices) -> LowRank:
        """Return the update of a weight that has no layer of its own. Raises TargetError for settings that need a layer."""
        from deltaw.errors import TargetError
        from deltaw.layers.kinds import PARAMETER
        from deltaw.methods.updates.lowrank import LowRank, Sliced
        from deltaw.methods.updates.weights import Stack

        if self.init == "pissa":
            raise TargetError(
                f"{weight.name} of a {type(weight.module).__name__} has no pissa start: it is no layer of its own."
            )
        if self.dropout:
            raise TargetError(
                f"{weight.name} of a {type(weight.module).__name__} is a weight without a layer of its own: there is no input "
                "of a branch that dropout could act on. Set dropout to 0, or leave it out of targets."
            )
        if weight.value.ndim == 3:
            return Stack(A, B, scale, transposed=weight.transposed)
        return Sliced(PARAMETER, A, B, scale, slices, weight.shape[0]) if slices else LowRank(PARAMETER, A, B, scale)


def _principal(
    W0: Tensor, A: Tensor, scale: float, slices: Slices, padding: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return A [r, k] and B [d, r] whose scale·BA is the part of W0 [d, k] with its r largest singular values.

    They have the dtype and rank of `A`. The column of a `padding` token counts as zero. Raises TargetError for slices of a layer.
    """
    from deltaw.errors import TargetError
    from deltaw.layers.ops.svd import of_matrix

    if slices:
        raise TargetError(f"A pissa start is of whole layers: it has no form for slices of one ({', '.join(slices)}).")
    if padding is not None:
        W0 = W0.clone()
        W0[:, padding] = 0
    near = of_matrix(W0, rank=A.shape[0])
    start = (near.A / scale**0.5).to(A)
    if padding is not None:
        start[:, padding] = 0
    return start, (near.B / scale**0.5).to(A)
