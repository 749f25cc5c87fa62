"""How large the base and each attached adapter are. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from deltaw.attached import adapters, coverage_of, named_parameters, parameters, record_of, updates
from deltaw.coverage import Coverage
from deltaw.ends import taught
from deltaw.layers.kinds import QuantisedKind, in_few_bits
from deltaw.layers.tree import owner_of, place_of
from deltaw.methods.updates.lowrank import low_rank_parts


@dataclass(frozen=True)
class AdapterSummary:
    """Size of one adapter."""

    layers: int
    """Modules that have an update: of a loaded adapter, those that its file reached."""
    parameters: int
    share: float
    """Of the base's parameters."""
    bytes: int
    coverage: Coverage
    """Which dense layers take an update, by role, and why the others do not."""
    zero: int = 0
    """How many low-rank updates have a B of zeros: they change nothing, as before the first step of a training."""
    rounding: float = 0.0
    """‖ΔW − ΔW'‖ / ‖ΔW‖ of an adapter that was loaded in less than its file's precision."""
    ends: tuple[int, ...] = ()
    """Ids of the tokens that end what it was taught to say."""

    @property
    def left_out(self) -> dict[str, str]:
        """Dense weights without an update, and why."""
        return self.coverage.left_out


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: the base's size and each adapter's."""

    base_parameters: int
    base_bytes: int
    active: str | None
    adapters: dict[str, AdapterSummary]


def summary(model: nn.Module) -> Summary:
    """Sizes of the base and of each attached adapter."""
    sizes = [_size(model, name, p) for name, p in named_parameters(model)]
    count = sum(n for n, _ in sizes)
    each = {}
    for name in adapters(model):
        own = parameters(model, name)
        size = sum(p.numel() for p in own)
        attached = record_of(model).attached[name]
        each[name] = AdapterSummary(
            layers=len(attached.layers),
            parameters=size,
            share=size / count,
            bytes=sum(p.numel() * p.element_size() for p in own),
            coverage=coverage_of(model, name),
            zero=sum(_is_zero(part.B.detach()) for part in low_rank_parts(updates(model, name))),
            rounding=attached.metadata.get("rounding", 0.0),
            ends=taught(model, [name]),
        )
    return Summary(count, sum(size for _, size in sizes), adapters(model).active, each)


def _is_zero(B: Tensor) -> bool:
    """Whether all entries are zero; a tensor without memory has none that is."""
    return not B.is_meta and not bool(B.float().any())  # float8 has no test of its own


def _size(model: nn.Module, name: str, parameter: Tensor) -> tuple[int, int]:
    """Entries and bytes of a parameter of the base; of one in few bits, those that it stands for and those that it takes."""
    layer, own = place_of(owner_of(model), name)
    form = in_few_bits(layer, own)
    if form is None:
        return parameter.numel(), parameter.numel() * parameter.element_size()
    d, k = QuantisedKind.shape(layer)
    return d * k, sum(t.numel() * t.element_size() for t in form.stored(layer))
