"""One update on one layer, a class for each kind of dense layer. Knows one layer, never a model.

A kind of layer says how its weight reads as W0 [d, k] (d out, k in) and whether a layer is of that kind. To add one:
subclass `LowRank`, list it in `KINDS`, test it in tests/test_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from deltaw import fused, lowrank
from deltaw.routes import Route
from deltaw.rows import Rows


class LowRank(nn.Module):
    """The update (A, B, scale) of one dense layer: A [r, k], B [d, r]; its ΔW is scale·B·A."""

    layer_class: ClassVar[type[nn.Module]]

    elsewhere: Callable[[Any, Tensor], Tensor] | None = None
    """While a training loop runs: computes what `branch` would, layer and x → output, together with other layers'."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.dropout = dropout

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @staticmethod
    def W0(layer: Any) -> Tensor:
        """The layer's weight as a [d, k] view of its storage. Kinds that store it otherwise say how."""
        return layer.weight

    def branch(self, layer: Any, x: Tensor) -> Tensor:
        """h = W0x + b + scale·B(Ax): x [..., k] → [..., d]."""
        return self.alone(layer, x) if self.elsewhere is None else self.elsewhere(layer, x)

    def alone(self, layer: Any, x: Tensor) -> Tensor:
        """The branch by this update's own A and B."""
        return fused.lowrank_linear(
            x, self.W0(layer), layer.bias, self.A, self.B, self.scale, self.dropout, training=self.training
        )

    def delta(self) -> Tensor:
        """ΔW, fp32 [d, k], by the arithmetic that merges use."""
        return lowrank.delta(self.A, self.B, self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class LowRankLinear(LowRank):
    """`nn.Linear`, whose weight is stored [d, k]."""

    layer_class = nn.Linear


class LowRankConv1D(LowRank):
    """GPT-2's `Conv1D`, a dense layer whose weight is stored [k, d]."""

    layer_class = Conv1D

    @staticmethod
    def W0(layer: Any) -> Tensor:
        return layer.weight.t()


KINDS: tuple[type[LowRank], ...] = (LowRankLinear, LowRankConv1D)


def kind_of(layer: nn.Module) -> type[LowRank] | None:
    """The class of update that fits this layer, or None when `why_not` has a reason."""
    return None if why_not(layer) else next(k for k in KINDS if isinstance(layer, k.layer_class))


def why_not(layer: nn.Module) -> str | None:
    """Why this layer cannot take an update; None when it can."""
    kind = next((k for k in KINDS if isinstance(layer, k.layer_class)), None)
    if kind is None:
        return f"{type(layer).__name__} is not a dense layer that deltaw adapts"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this weight without calling the layer"
    if plain_class(layer).forward is not kind.layer_class.forward:
        return f"{type(layer).__name__} has a forward of its own"
    if "forward" in vars(layer):
        return "its forward was replaced on the object (accelerate does so to offload a layer), which would bypass the update"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own (another parametrization computes it)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not a floating-point tensor"
    return None


def shape(layer: nn.Module) -> tuple[int, int]:
    """(d, k) of a layer that has a kind."""
    kind = kind_of(layer)
    assert kind is not None
    d, k = kind.W0(layer).shape
    return d, k


class Slot(nn.Module):
    """The one child that an adapted layer gets: its updates by adapter name, and the model's route."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route

    # Straight into _modules: add_module would refuse adapter names such as "route" or "training"
    def put(self, name: str, update: LowRank) -> None:
        self._modules[name] = update

    def drop(self, name: str) -> None:
        self._modules.pop(name, None)

    def names(self) -> list[str]:
        return list(self._modules)

    def get(self, name: str | None) -> Any:
        return self._modules.get(name) if name is not None else None


SLOT = "deltaw"
"""Name of the child module that holds a layer's updates."""

_adapted: dict[type[nn.Module], type[nn.Module]] = {}


def adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` whose forward adds the active update. Cached, so that copies share it."""
    if cls not in _adapted:

        def forward(self: Any, *inputs: Tensor, **named: Tensor) -> Tensor:
            slot = self._modules[SLOT]
            chosen = slot.route.chosen()
            if type(chosen) is Rows:
                (x,) = (*inputs, *named.values())  # one input, under whatever name the layer's own forward gives it
                return chosen.through(slot._modules, x, cls.forward(self, x))
            update = slot._modules.get(chosen)
            if update is None:
                return cls.forward(self, *inputs, **named)
            (x,) = (*inputs, *named.values())
            return update.branch(self, x)

        def reduce(self: Any, protocol: SupportsIndex) -> tuple[Any, ...]:
            return _unpickled, (cls,), vars(self)

        own = {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__}
        _adapted[cls] = type(cls.__name__, (cls,), own)
    return _adapted[cls]


def _unpickled(cls: type[nn.Module]) -> nn.Module:
    """An empty layer of `cls`'s adapted class, for pickle to fill: the class itself has no name to be found by."""
    adapted = adapted_class(cls)
    return adapted.__new__(adapted)


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the layer had before it was adapted."""
    cls = type(layer)
    return cls.__mro__[1] if _adapted.get(cls.__mro__[1]) is cls else cls


def slot_of(layer: nn.Module) -> Slot | None:
    found = layer._modules.get(SLOT)
    return found if isinstance(found, Slot) else None


def open_slot(layer: nn.Module, route: Route) -> Slot:
    """Give the layer its slot and its dynamic class; nothing changes while the route is off it."""
    slot = Slot(route)
    slot.train(layer.training)
    layer.__class__ = adapted_class(type(layer))
    layer._modules[SLOT] = slot
    return slot


def close_slot(layer: nn.Module) -> None:
    """Undo `open_slot`: the layer has its own class and children again."""
    layer.__class__ = plain_class(layer)
    del layer._modules[SLOT]


def gaussian(r: int, k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A [r, k] ~ N(0, 1/k) (paper §4.1: 'a random Gaussian initialization for A'), drawn on the CPU from torch's
    global generator, so a seed gives the same A on every device."""
    return torch.randn(r, k).div_(k**0.5).to(device, dtype)


def kaiming(r: int, k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A [r, k] ~ U(−1/√k, 1/√k): Kaiming-uniform with a = √5, what loralib and PEFT start from."""
    return torch.empty(r, k).uniform_(-(k**-0.5), k**-0.5).to(device, dtype)


INITS = {"gaussian": gaussian, "kaiming": kaiming}
