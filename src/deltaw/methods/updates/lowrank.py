"""LoRA's update of one layer, ΔW = scale·BA: of a whole weight, of slices of a fused one, or from another start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError
from deltaw.layers.kinds import Kind, Runs, as_stored, kind_named, why_not
from deltaw.layers.ops.merging import Change, Product, Value, delta_norm
from deltaw.layers.patch import only_input
from deltaw.methods.updates.base import Letter, Update, square


class LowRank(Update):
    """ΔW = scale·B·A on one dense layer, with A [r, k] and B [d, r] (Hu et al. 2021, arXiv 2106.09685, §4.1).

    A `bias` [d] stands in place of the layer's, or is one for a layer without.
    """

    kind: Kind
    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    scale: float
    dropout: float
    slices: Mapping[str, Runs] = MappingProxyType({})
    """Name → rows of the layer's output, of an update of slices alone; empty for one of the whole layer."""
    made_of: ClassVar[Mapping[Letter, str]] = {"A": "A", "B": "B"}
    """The letters of the two factors → the names of the trained parameters that these are, or are made of."""
    elsewhere: Callable[[nn.Module, Tensor], Tensor] | None = None
    """Computes the branch (layer and x → output) together with other layers' while a training loop runs."""

    def __init__(
        self, kind: Kind, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        # Past nn.Module.__setattr__, which is slow: an adapter has hundreds of these
        vars(self).update(kind=kind, scale=scale, dropout=dropout)
        self._parameters["A"], self._parameters["B"] = nn.Parameter(A), nn.Parameter(B)
        self._parameters["bias"] = None if bias is None else nn.Parameter(bias)

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore a pickle or a copy. Pickles of version 0.1 hold the kind's class, not its instance."""
        if isinstance(state["kind"], type):
            state = {**state, "kind": kind_named(state["kind"].__name__)}
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    @property
    def rank(self) -> int:
        """Rows of A and columns of B: those that it is merged with."""
        return self.A.shape[0]

    def factors(self) -> dict[Letter, nn.Parameter]:
        return {letter: getattr(self, name) for letter, name in self.made_of.items()}

    @property
    def plain(self) -> LowRank | None:
        # A subclass computes its branch in another way
        return self if type(self) is LowRank and self.bias is None and self.kind.multiplies else None

    @property
    def product(self) -> Product:
        """scale·B·A, with gradients. It is ΔW but for DoRA, which also rescales."""
        return Product(self.A, self.B, self.scale)

    @property
    def exact_product(self) -> Product | None:
        return Product(self.A.detach(), self.B.detach(), self.scale)

    def low_rank(self) -> dict[str, LowRank]:
        return {"weight": self}

    def values(self) -> dict[str, nn.Parameter]:
        return {} if self.bias is None else {"bias": self.bias}

    def remade(self, A: Tensor, B: Tensor, bias: Tensor | None = None) -> LowRank:
        """Return an update of the same weight whose ΔW is BA, with A [r, k] and B [d, r] of any rank."""
        return LowRank(self.kind, A, B, 1.0, bias=bias)

    def joined(self, terms: Sequence[tuple[LowRank, float]], bias: Tensor | None = None) -> LowRank:
        """Return Σ weight·ΔW over updates of this weight that have an exact product.

        A's and B's are concatenated, so that ranks add up, in the widest of their dtypes, fp32 at least.
        """
        wide = _widest(terms)
        products = [(update.product, weight) for update, weight in terms]
        A = torch.cat([p.A.detach().to(wide) for p, _ in products], dim=-2)
        B = torch.cat([p.B.detach().to(wide) * (p.scale * weight) for p, weight in products], dim=-1)
        return self.remade(A, B, bias)

    def keep_in(self, dtype: torch.dtype) -> None:
        """Round the trained parameters of A and B to this dtype, as new parameters."""
        for letter, value in self.factors().items():
            self._parameters[self.made_of[letter]] = nn.Parameter(value.detach().to(dtype))

    def W0(self, layer: nn.Module) -> Tensor:
        """Return the layer's weight [d, k], a view of its storage where it is not quantised."""
        return self.kind.W0(layer)

    def branch(self, layer: nn.Module, *inputs: Tensor, **named: Tensor) -> Tensor:
        """x [..., k] → [..., d]."""
        x = only_input(layer, inputs, named)
        return self.alone(layer, x) if self.elsewhere is None else self.elsewhere(layer, x)

    def alone(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Compute the branch by this update's tensors, apart from other layers: x [..., k] → [..., d]."""
        if self.bias is None:
            return self._sum(layer, x, layer._parameters.get("bias"))
        return plus(self._sum(layer, x, None), self.kind.per_output(layer, self.bias))

    def _sum(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute W0x + bias + scale·BAx."""
        return self.kind.branch(layer, x, self, bias)

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        change: dict[str, Change] = {"weight": self.product}
        return change if self.bias is None else change | {"bias": Value(self.bias.detach().reshape(1, -1))}

    def parameter(self, layer: nn.Module, own_name: str) -> Tensor | None:
        if own_name == "weight":
            return as_stored(layer, own_name, self.weight(self.W0(layer)))
        if own_name == "bias" and self.bias is not None:
            return self.bias.to(self.W0(layer).dtype)
        return super().parameter(layer, own_name)

    def weight(self, W0: Tensor) -> Tensor:
        """Return W0 + ΔW [d, k] in W0's dtype; gradients flow to A and B.

        Raises AdapterError in training with dropout, which has no input to act on here.
        """
        if self.training and self.dropout:
            raise AdapterError(
                f"The module around this layer ({self.B.shape[0]} outputs, {self.A.shape[1]} inputs) uses its weight without "
                f"calling it, so a dropout of {self.dropout:g} has no input to act on. Set dropout to 0, or leave the layer "
                "out of targets."
            )
        return torch.addmm(W0, self.B.to(W0.dtype), self.A.to(W0.dtype), alpha=self.scale)

    def stand_in(self, W0: Tensor) -> Tensor:
        """Return W0 + ΔW for a module whose forward uses it in place of a parameter W0 without a layer."""
        return self.weight(W0)

    def misfit(self, layer: nn.Module) -> str | None:
        return why_not(layer) or self.other_shape(layer)

    def other_shape(self, layer: nn.Module) -> str | None:
        d, k = self.kind.shape(layer)
        if why := self.other_weight((d, k)):
            return why
        if self.bias is not None and self.bias.shape != (d,):
            return f"its bias is {list(self.bias.shape)}, the layer has {d} outputs"
        return None

    def other_weight(self, shape: tuple[int, ...]) -> str | None:
        """Return why it is no update of a weight of this shape; None where it is one."""
        (d, k), (outputs, inputs) = shape, self.fits
        return None if (outputs, inputs) == (d, k) else f"the update is {outputs}×{inputs}, the layer {d}×{k}"

    @property
    def fits(self) -> tuple[int, int]:
        """(d, k) of the weights that it is an update of."""
        return self.B.shape[0], self.A.shape[1]

    def squared(self) -> float:
        """Return ‖scale·BA‖², without forming the product."""
        return delta_norm(self.A, self.B, self.scale) ** 2

    def moved(self, layer: nn.Module) -> tuple[float, float]:
        return self.squared(), square(self.W0(layer))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class Sliced(LowRank):
    """Updates of n slices of a fused layer (query and value where the layer also computes the key), each with its A and B.

    As one update of the layer: A [n·r, k] has the slices' A's one under the other. B [d, n·r] has their B's in each slice's rows
    and columns, and zeros elsewhere. So it is merged, and so PEFT's format has it.
    """

    made_of: ClassVar[Mapping[Letter, str]] = {"A": "A", "B": "B_rows"}
    B_rows: nn.Parameter
    rows: Tensor
    number: Tensor
    d: int

    def __init__(
        self, kind: Kind, A: Tensor, B_rows: Tensor, scale: float, slices: Mapping[str, Runs], d: int,
        dropout: float = 0.0, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take A [n·r, k] and B_rows [Σ rows, r], in the order of `slices` (name → rows of the layer's d outputs)."""
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

    @property
    def fits(self) -> tuple[int, int]:
        return self.d, self.A.shape[1]

    def joined(self, terms: Sequence[tuple[LowRank, float]], bias: Tensor | None = None) -> LowRank:
        """Keep slices as slices where all terms have the same ones."""
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
    """Return the widest dtype of these updates' A's, fp32 at least."""
    dtype = torch.float32
    for update, _ in terms:
        dtype = torch.promote_types(dtype, update.A.dtype)
    return dtype


def places_of(slices: Mapping[str, Runs]) -> tuple[Tensor, Tensor]:
    """Return two int64 vectors [Σ rows], over the rows of the slices in their order.

    The first has each row's place in the layer's output, the second the number of its slice.
    """
    places = [torch.cat([torch.arange(start, stop) for start, stop in runs]) for runs in slices.values()]
    return torch.cat(places), torch.cat([torch.full_like(rows, i) for i, rows in enumerate(places)])


def sliced_rows(B: Tensor, slices: Mapping[str, Runs]) -> Tensor | None:
    """Return the slices' entries [Σ rows, r] of a B [d, n·r]; None where B has other entries that are not zero."""
    rows, number = places_of(slices)
    if B.shape[1] % len(slices) or int(rows.max()) >= B.shape[0]:
        return None
    whole = B.reshape(B.shape[0], len(slices), -1)
    entries = whole[rows, number]
    return entries if int(torch.count_nonzero(entries)) == int(torch.count_nonzero(whole)) else None


class Recentred(LowRank):
    """ΔW = scale·(BA − B0A0): A and B start at values A0 and B0 other than zero (PiSSA, Meng et al. 2024, arXiv 2404.02948, §3).

    The start is taken off again, so that W0 stays as it is. As one update of the layer: A [2r, k] has A0 under A, B [d, 2r] has
    −B0 beside B. So it is merged, and so PEFT's format has it.
    """

    made_of: ClassVar[Mapping[Letter, str]] = {"A": "own_A", "B": "own_B"}
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


def plus(out: Tensor, bias: Tensor) -> Tensor:
    """Return out + bias in the dtype of `out`."""
    return out + bias.to(out.dtype)


def gaussian(r: int, k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return A [r, k] ~ N(0, 1/k) (Hu et al. 2021, §4.1: "a random Gaussian initialization for A").

    It is drawn on the CPU from torch's global generator, so that a seed gives the same A on every device.
    """
    return torch.randn(r, k).div_(k**0.5).to(device, dtype)


def kaiming(r: int, k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return A [r, k] ~ U(−1/√k, 1/√k): Kaiming-uniform with a = √5, the start of loralib and PEFT."""
    return torch.empty(r, k).uniform_(-(k**-0.5), k**-0.5).to(device, dtype)


INITS = {"gaussian": gaussian, "kaiming": kaiming}
"""Name of a start, as `LoRA.init` has it → A [r, k] on a device, in a dtype."""
