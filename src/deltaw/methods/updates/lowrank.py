"""LoRA's update of one layer, ΔW = scale·BA: of a whole weight, of slices of a fused one, or from another start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError
from deltaw.layers.kinds import Kind, Runs, as_stored, kind_named, why_not
from deltaw.layers.ops.merging import Change, Product, Value, delta_norm
from deltaw.layers.patch import only_input
from deltaw.methods.updates.base import Update, square


class LowRank(Update):
    """The update (A, B, scale) of one dense layer: A [r, k], B [d, r]; its ΔW is scale·B·A. With a bias [d], the layer has that
    in place of its own, if it has one."""

    kind: Kind
    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    scale: float
    dropout: float
    elsewhere: Callable[[Any, Tensor], Tensor] | None = None
    """While a training loop runs: computes what `branch` would, layer and x → output, together with other layers'."""

    def __init__(
        self, kind: Kind, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        # Straight into their places: an adapter has hundreds of these, and a module's own way of setting takes its time
        vars(self).update(kind=kind, scale=scale, dropout=dropout)
        self._parameters["A"], self._parameters["B"] = nn.Parameter(A), nn.Parameter(B)
        self._parameters["bias"] = None if bias is None else nn.Parameter(bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or a copy. Pickles of version 0.1 hold the kind's class, not its instance."""
        if isinstance(state["kind"], type):
            state = {**state, "kind": kind_named(state["kind"].__name__)}
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    made_of: ClassVar[Mapping[str, str]] = {"A": "A", "B": "B"}
    """The letters of the two factors → the names of the trained parameters that these are, or are made of."""

    def factors(self) -> dict[str, nn.Parameter]:
        """The trained parameters that A and B are, or are made of, by those letters."""
        return {letter: getattr(self, own) for letter, own in self.made_of.items()}

    @property
    def plain(self) -> bool:
        """It is A and B and nothing else, on a layer that multiplies by a matrix."""
        return type(self) is LowRank and self.bias is None and self.kind.multiplies

    @property
    def stackable(self) -> bool:  # type: ignore[override]
        return self.plain

    @property
    def product(self) -> Product:
        return Product(self.A, self.B, self.scale)

    @property
    def exact_product(self) -> Product | None:
        """ΔW as a product of an A [r, k] and a B [d, r], those of a stack [E, r, k] and [E, d, r]; None where it is none."""
        return Product(self.A.detach(), self.B.detach(), self.scale)

    def low_rank(self) -> dict[str, LowRank]:
        return {"weight": self}

    def values(self) -> dict[str, nn.Parameter]:
        return {} if self.bias is None else {"bias": self.bias}

    def remade(self, A: Tensor, B: Tensor, bias: Tensor | None = None) -> LowRank:
        """An update of the same weight whose ΔW is BA."""
        return LowRank(self.kind, A, B, 1.0, bias=bias)

    def joined(self, terms: Sequence[tuple[LowRank, float]], bias: Tensor | None = None) -> LowRank:
        """Σ weight·ΔW of updates of this weight, each with an exact product: A's and B's concatenated, so that ranks add up. The
        result has the widest of their dtypes, fp32 at least."""
        wide = _widest(terms)
        products = [(update.product, weight) for update, weight in terms]
        A = torch.cat([p.A.detach().to(wide) for p, _ in products], dim=-2)
        B = torch.cat([p.B.detach().to(wide) * (p.scale * weight) for p, weight in products], dim=-1)
        return self.remade(A, B, bias)

    def W0(self, layer: Any) -> Tensor:
        """The layer's weight as a [d, k] view of its storage, where it is stored so."""
        return self.kind.W0(layer)

    def branch(self, layer: Any, *inputs: Any, **named: Any) -> Tensor:
        """x [..., k] → [..., d]."""
        x = only_input(layer, inputs, named)
        return self.alone(layer, x) if self.elsewhere is None else self.elsewhere(layer, x)

    def alone(self, layer: Any, x: Tensor) -> Tensor:
        """The branch by this update's own tensors."""
        own = layer._parameters.get("bias")
        if self.bias is None:
            return self._sum(layer, x, own)
        return _plus(self._sum(layer, x, None), self.kind.per_output(layer, self.bias))

    def _sum(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """W0x + bias + scale·BAx."""
        return self.kind.branch(layer, x, self, bias)

    def changes(self, layer: Any) -> dict[str, Change]:
        change: dict[str, Change] = {"weight": self.product}
        return change if self.bias is None else change | {"bias": Value(self.bias.detach().reshape(1, -1))}

    def parameter(self, layer: Any, own_name: str) -> Tensor | None:
        if own_name == "weight":
            return as_stored(layer, own_name, self.weight(self.W0(layer)))
        if own_name == "bias" and self.bias is not None:
            return self.bias.to(self.W0(layer).dtype)
        return super().parameter(layer, own_name)

    def weight(self, W0: Tensor) -> Tensor:
        """W0 + ΔW [d, k], in its dtype; gradients flow to A and B. Raises AdapterError where dropout cannot be computed so."""
        if self.training and self.dropout:
            raise AdapterError(
                f"The module around this layer ({self.B.shape[0]} outputs, {self.A.shape[1]} inputs) uses its weight without "
                f"calling it, so a dropout of {self.dropout:g} has no input to act on. Set dropout to 0, or leave the layer "
                "out of targets."
            )
        return torch.addmm(W0, self.B.to(W0.dtype), self.A.to(W0.dtype), alpha=self.scale)

    def stand_in(self, W0: Tensor) -> Tensor:
        """What a module's forward is given in the place of a parameter W0 that has no layer: W0 + ΔW."""
        return self.weight(W0)

    def misfit(self, layer: Any) -> str | None:
        return why_not(layer) or self.other_shape(layer)

    def other_shape(self, layer: Any) -> str | None:
        """Where its shapes are others than those of a layer that can take an update."""
        d, k = self.kind.shape(layer)
        if why := self.other_weight((d, k)):
            return why
        if self.bias is not None and self.bias.shape != (d,):
            return f"its bias is {list(self.bias.shape)}, the layer has {d} outputs"
        return None

    def other_weight(self, shape: tuple[int, ...]) -> str | None:
        """Where it is an update of another shape than this, a weight's."""
        (d, k), own = shape, (self.B.shape[0], self.A.shape[1])
        return None if own == (d, k) else f"the update is {own[0]}×{own[1]}, the layer {d}×{k}"

    def squared(self) -> float:
        """‖ΔW‖²"""
        return delta_norm(self.A, self.B, self.scale) ** 2

    def moved(self, layer: Any) -> tuple[float, float]:
        return self.squared(), square(self.W0(layer))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class Sliced(LowRank):
    """Updates of some slices of a fused layer (query and value of a layer that also computes the key), each with an A and a B of
    its own. As one update of the layer: A [n·r, k] has the slices' A's one under the other, B [d, n·r] their B's, zero but for
    each slice's own rows and columns; so it is merged, and so PEFT's format has it."""

    made_of = MappingProxyType({"A": "A", "B": "B_rows"})
    B_rows: nn.Parameter
    rows: Tensor
    number: Tensor
    slices: dict[str, Runs]
    d: int

    def __init__(
        self, kind: Kind, A: Tensor, B_rows: Tensor, scale: float, slices: Mapping[str, Runs], d: int,
        dropout: float = 0.0, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        """A [n·r, k] and B_rows [Σ rows, r] in the order of `slices` (name → rows of the layer's d outputs)."""
        super().__init__(kind, A, B_rows, scale, dropout, bias)
        self._parameters["B_rows"] = self._parameters.pop("B")
        vars(self).update(slices=dict(slices), d=d)
        rows, number = places_of(self.slices)
        self.register_buffer("rows", rows.to(A.device), persistent=False)
        self.register_buffer("number", number.to(A.device), persistent=False)

    @property
    def B(self) -> Tensor:  # type: ignore[override]
        """[d, n·r]"""
        n, r = len(self.slices), self.B_rows.shape[1]
        whole = self.B_rows.new_zeros(self.d, n, r)
        return whole.index_put((self.rows, self.number), self.B_rows).view(self.d, n * r)

    def other_weight(self, shape: tuple[int, ...]) -> str | None:
        (d, k), own = shape, (self.d, self.A.shape[1])
        return None if own == (d, k) else f"the update is {own[0]}×{own[1]}, the layer {d}×{k}"

    def joined(self, terms: Sequence[tuple[LowRank, float]], bias: Tensor | None = None) -> LowRank:
        """Slices stay slices where all terms have the same ones."""
        alike = [(u, weight) for u, weight in terms if isinstance(u, Sliced) and u.slices == self.slices]
        if len(alike) < len(terms):
            return super().joined(terms, bias)
        wide, n, k = _widest(terms), len(self.slices), self.A.shape[1]
        A = torch.cat([u.A.detach().to(wide).view(n, -1, k) for u, _ in alike], dim=1).view(-1, k)
        rows = torch.cat([u.B_rows.detach().to(wide) * (u.scale * weight) for u, weight in alike], dim=1)
        return Sliced(self.kind, A, rows, 1.0, self.slices, self.d, bias=bias)

    def extra_repr(self) -> str:
        return f"slices={','.join(self.slices)}, {super().extra_repr()}"


def low_rank_parts(updates: Mapping[str, Update]) -> Iterator[LowRank]:
    """Yield the low-rank updates that an adapter's updates are made of, those of weights without a layer included."""
    for update in updates.values():
        yield from update.low_rank().values()


def _widest(terms: Sequence[tuple[LowRank, float]]) -> torch.dtype:
    """The widest dtype of these updates' A's, fp32 at least."""
    dtype = torch.float32
    for update, _ in terms:
        dtype = torch.promote_types(dtype, update.A.dtype)
    return dtype


def places_of(slices: Mapping[str, Runs]) -> tuple[Tensor, Tensor]:
    """Of each row that the slices have, one slice after the other: which row of the layer's output it is, and which slice's."""
    own = [torch.cat([torch.arange(start, stop) for start, stop in runs]) for runs in slices.values()]
    return torch.cat(own), torch.cat([torch.full_like(rows, i) for i, rows in enumerate(own)])


def sliced_rows(B: Tensor, slices: Mapping[str, Runs]) -> Tensor | None:
    """The slices' own entries of a B [d, n·r], [Σ rows, r]; None where it is not one of theirs: others are not zero."""
    rows, number = places_of(slices)
    if B.shape[1] % len(slices) or int(rows.max()) >= B.shape[0]:
        return None
    whole = B.reshape(B.shape[0], len(slices), -1)
    own = whole[rows, number]
    return own if int(torch.count_nonzero(own)) == int(torch.count_nonzero(whole)) else None


class Recentred(LowRank):
    """A low-rank update whose A and B start at values of their own instead of at ΔW = 0 (PiSSA's start): ΔW = scale·(BA − B0A0),
    the start B0A0 taken off again, so that W0 stays what it is. As one update of the layer: A [2r, k] has A0 under A, B [d, 2r]
    −B0 beside B; so it is merged, and so PEFT's format has it."""

    made_of = MappingProxyType({"A": "own_A", "B": "own_B"})
    own_A: nn.Parameter
    own_B: nn.Parameter
    start_A: Tensor
    start_B: Tensor

    def __init__(self, kind: Kind, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(kind, A, B, scale, dropout)
        self._parameters = {"own_A": self._parameters["A"], "own_B": self._parameters["B"], "bias": None}
        self.register_buffer("start_A", A.detach().clone())
        self.register_buffer("start_B", B.detach().clone())

    @property
    def A(self) -> Tensor:  # type: ignore[override]
        """[2r, k]"""
        return torch.cat([self.own_A, self.start_A])

    @property
    def B(self) -> Tensor:  # type: ignore[override]
        """[d, 2r]"""
        return torch.cat([self.own_B, -self.start_B], 1)


# Entries of W0 that are widened at once
_WIDENED = 1 << 22


def _plus(out: Tensor, bias: Tensor) -> Tensor:
    return out + bias.to(out.dtype)


def added(weight: Tensor, indices: Tensor) -> int:
    """How many rows a weight lacks for the last of these tokens; `indices` are in order."""
    return max(0, int(indices[-1]) + 1 - weight.shape[0])


def with_room(weight: Tensor, indices: Tensor) -> Tensor:
    """A copy of a weight that has rows for all of these tokens, zero where it had none."""
    return torch.cat([weight, weight.new_zeros(added(weight, indices), weight.shape[1])])


def gaussian(r: int, k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A [r, k] ~ N(0, 1/k) (paper §4.1: 'a random Gaussian initialization for A'), drawn on the CPU from torch's
    global generator, so a seed gives the same A on every device."""
    return torch.randn(r, k).div_(k**0.5).to(device, dtype)


def kaiming(r: int, k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A [r, k] ~ U(−1/√k, 1/√k): Kaiming-uniform with a = √5, what loralib and PEFT start from."""
    return torch.empty(r, k).uniform_(-(k**-0.5), k**-0.5).to(device, dtype)


INITS = {"gaussian": gaussian, "kaiming": kaiming}
