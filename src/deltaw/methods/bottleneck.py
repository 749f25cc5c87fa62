"""Bottleneck adapters: two small dense layers with a nonlinearity between, put in series with the model's own. Knows how their
settings become updates.

Houlsby et al. 2019 (arXiv 1902.00751; the paper's Adapter^H): behind the attention and behind the feed-forward of each block,
before their sums with the residual. Pfeiffer et al. 2021 (arXiv 2005.00247; Adapter^P): behind the feed-forward alone. Lin
et al. 2020 (arXiv 2004.03829; Adapter^L): behind the whole block, on a LayerNorm of its output. AdapterDrop (Rücklé et al. 2021,
arXiv 2010.11918; Adapter^D): none in the lowest blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deltaw.config import check
from deltaw.methods.plan import Plan, Preset, register
from deltaw.methods.shared import Beside

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltaw.methods.targets import Layer
    from deltaw.methods.updates.base import Update


@register(
    "bottleneck",
    lr=1e-3,
    presets={
        "houlsby": Preset(lr=1e-3, settings={"kind": "houlsby", "size": 32, "norms": True}),
        "pfeiffer": Preset(lr=2e-3, settings={"kind": "pfeiffer", "size": 64}),
        "lin": Preset(lr=2e-3, settings={"kind": "lin", "size": 64}),
        "adapterdrop": Preset(lr=1e-3, settings={"kind": "houlsby", "size": 32, "drop": 5}),
    },
)
@dataclass(frozen=True)
class Bottleneck(Beside):
    """Adapter layers behind parts of each block: h + up·f(down·h + b) + c (Houlsby et al. 2019, arXiv 1902.00751, §2.1).

    Trains down [m, d], b [m], up [d, m] and c [d] at each place, up and the biases zero at the start.

    Raises:
        ConfigError: A setting is out of range.

    Example:
        >>> import deltaw
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("model")
        >>> model = deltaw.attach(model, deltaw.Bottleneck(size=4, kind="pfeiffer"))
        >>> deltaw.summary(model).adapters["default"].parameters  # of 2 blocks: 2·32·4 + 4 + 32
        584
    """

    size: int = 64
    """Width m of the bottleneck, at least 1."""
    kind: Literal["houlsby", "pfeiffer", "lin"] = "houlsby"
    """Place of the adapters: behind attention and feed-forward (houlsby), the feed-forward (pfeiffer) or the block (lin).
    Sources: Houlsby et al. 2019 (§2.1); Pfeiffer et al. 2021 (arXiv 2005.00247); Lin et al. 2020 (arXiv 2004.03829), on a
    norm of its own."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Function between the two layers."""
    drop: int = 0
    """Number of the lowest blocks that have no adapters. (AdapterDrop: Rücklé et al. 2021, arXiv 2010.11918.)"""

    def __post_init__(self) -> None:
        check(self, size=(1, None), drop=(0, None))

    def plan(self, model: nn.Module) -> Plan:
        """Return an adapter for each place, fp32 (float64 on a float64 base).

        `down` is drawn from torch's global generator in the places' order. `up` is zero, so that nothing changes at the start.
        Raises TargetError where the model has no such places.
        """
        import torch

        from deltaw.methods.updates.bottleneck import Inserted
        from deltaw.methods.updates.lowrank import gaussian

        updates: dict[str, Update] = {}
        for name, (d, weight) in self._places(model).items():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            down = gaussian(self.size, d, weight.device, dtype)
            updates[name] = Inserted(down, self.activation, norm=self.kind == "lin")
        return self.planned(model, updates)

    def _places(self, model: nn.Module) -> dict[str, tuple[int, Tensor]]:
        """Return module name → the width d of its output, and a weight that has its device and dtype. Raises TargetError."""
        from deltaw.errors import TargetError
        from deltaw.methods.targets import blocks_of, select

        blocks = blocks_of(model)
        if not blocks:
            raise TargetError(f"{type(model).__name__} has no stack of blocks that adapters could be put in.")
        if self.drop > max(blocks.values()):
            raise TargetError(
                f"drop is {self.drop}, and the model has {1 + max(blocks.values())} blocks: none is left."
            )
        places: dict[str, tuple[int, Tensor]] = {}
        for name, layer in select(model, "o,down" if self.kind == "houlsby" else "down", 1).layers.items():
            block = next((block for block in blocks if name.startswith(f"{block}.")), None)
            if block is not None and blocks[block] >= self.drop:
                places[block if self.kind == "lin" else name] = _width(name, layer, self.kind)
        return places


def _width(name: str, layer: Layer, kind: str) -> tuple[int, Tensor]:
    """Return the width of a layer's output, and its weight. Raises TargetError for a layer that nothing can stand behind."""
    from deltaw.errors import TargetError
    from deltaw.layers.kinds import Weight, shape

    if not isinstance(layer, Weight):
        weight = layer._parameters["weight"]
        assert weight is not None
        return shape(layer)[0], weight
    if kind != "lin":
        raise TargetError(
            f"{name!r} is a weight without a layer of its own: no adapter can stand behind it. The kind lin puts them behind "
            "the blocks."
        )
    return layer.shape[0], layer.value
