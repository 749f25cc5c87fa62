"""The report of a merge, layer by layer, and the refusal of a merge that changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict

from deltaw.errors import MergeError
from deltaw.layers.names import family
from deltaw.layers.ops.merging import MergeStats


class MergeRow(TypedDict):
    """The figures of some layers together, as a report of a run holds them in JSON."""

    layers: str
    """The layers' name: a family such as model.layers.*.mlp.up_proj, one layer, or all."""
    count: int
    relative: float
    survived: float
    changed: float
    largest_change: float


@dataclass(frozen=True)
class MergeReport:
    """The figures of a merge for each layer and all together.

    All norms are Frobenius norms; ΔW is what the adapters add to W0, and W' what the weight holds after the merge.

    >>> import deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=4))
    >>> report = deltaw.merge(model, allow_unchanged=True)  # untrained: ΔW is zero
    >>> report.adapters, len(report.layers), report.relative, report.changed
    (('default',), 14, 0.0, 0.0)
    """

    adapters: tuple[str, ...]
    """The adapters that were merged, in their order."""
    layers: dict[str, MergeStats]
    """Name of a layer, or of a parameter that is no layer's weight → its figures."""
    extra_memory: int = 0
    """Bytes that are kept until `unmerge`."""

    @property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W0‖ over all merged layers together."""
        total = sum(s.w0_norm**2 for s in self.layers.values())
        return (sum(s.dw_norm**2 for s in self.layers.values()) / total) ** 0.5 if total else 0.0

    @property
    def survived(self) -> float:
        """The share of ΔW that rounding to the weights' dtype kept, weighted by ‖ΔW‖²; 1.0 is all of it."""
        total = sum(s.dw_norm**2 for s in self.layers.values())
        return sum(s.survived * s.dw_norm**2 for s in self.layers.values()) / total if total else 1.0

    @property
    def largest_change(self) -> float:
        """The largest |W' − W0| of any entry."""
        return max((s.largest_change for s in self.layers.values()), default=0.0)

    @property
    def changed(self) -> float:
        """The share of a layer's entries that differ after the merge, averaged over the layers."""
        return sum(s.changed for s in self.layers.values()) / max(1, len(self.layers))

    def rows(self) -> list[MergeRow]:
        """Return the figures of each family of layers, then of all together."""
        families: dict[str, dict[str, MergeStats]] = {}
        for name, stats in self.layers.items():
            families.setdefault(family(name), {})[name] = stats
        parts = [(name, MergeReport(self.adapters, layers)) for name, layers in families.items()]
        return [part.row(name) for name, part in (*parts, ("all", self))]

    def row(self, name: str) -> MergeRow:
        """Return the figures of all layers together under `name`."""
        return {
            "layers": name, "count": len(self.layers), "relative": self.relative, "survived": self.survived,
            "changed": self.changed, "largest_change": self.largest_change,
        }  # fmt: skip


def check_merged(stats: Mapping[str, MergeStats], allow_unchanged: bool, updated: Iterable[str] | None = None) -> None:
    """Raise MergeError for merged weights that are not finite, or that a merge left unchanged.

    `updated` names the weights that a merge must change, by default all of `stats`; `allow_unchanged` lets them stay.
    """
    broken = [n for n, s in stats.items() if not math.isfinite(s.largest_change)]
    if broken:
        raise MergeError(
            f"{len(broken)} of {len(stats)} merged weights would not be finite (NaN or infinity): ΔW is not, or the sum "
            "is too large for the weight's dtype:",
            [n if math.isfinite(stats[n].w0_norm) else f"{n}: the base's weight itself is not finite" for n in broken],
        )
    same = [n for n in (stats if updated is None else updated) if stats[n].changed == 0.0]
    if same and not allow_unchanged:
        problems = [
            f"{n}: " + ("ΔW is zero (was it trained?)" if not stats[n].dw_norm else "its dtype rounds ΔW away")
            for n in same
        ]
        raise MergeError(
            f"{len(same)} of {len(stats)} targeted weights would come out of the merge unchanged:", problems
        )
