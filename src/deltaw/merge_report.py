"""What a merge did, layer by layer, and whether that is a merge at all. Knows no models and no files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.errors import MergeError, listing
from deltaw.layers.names import family
from deltaw.layers.ops.merging import MergeStats


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, per layer."""

    adapters: tuple[str, ...]
    layers: dict[str, MergeStats]
    extra_memory: int = 0
    """Bytes that are kept until `unmerge`."""

    @property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W0‖ over all merged layers together."""
        total = sum(s.w0_norm**2 for s in self.layers.values())
        return (sum(s.dw_norm**2 for s in self.layers.values()) / total) ** 0.5 if total else 0.0

    @property
    def survived(self) -> float:
        """Share of ΔW that the rounding to the weights' dtype kept, weighted by ‖ΔW‖²."""
        total = sum(s.dw_norm**2 for s in self.layers.values())
        return sum(s.survived * s.dw_norm**2 for s in self.layers.values()) / total if total else 1.0

    @property
    def largest_change(self) -> float:
        """The largest |W'−W0| of any entry."""
        return max((s.largest_change for s in self.layers.values()), default=0.0)

    @property
    def changed(self) -> float:
        """Share of a layer's entries that differ after the merge, on average over layers."""
        return sum(s.changed for s in self.layers.values()) / max(1, len(self.layers))

    def rows(self) -> list[dict[str, Any]]:
        """The figures of each family of layers, then of all together."""
        families: dict[str, dict[str, MergeStats]] = {}
        for name, stats in self.layers.items():
            families.setdefault(family(name), {})[name] = stats
        parts = [(name, MergeReport(self.adapters, layers)) for name, layers in families.items()]
        return [part.row(name) for name, part in (*parts, ("all", self))]

    def row(self, name: str) -> dict[str, Any]:
        """The figures of all its layers together, under `name`."""
        return {
            "layers": name, "count": len(self.layers), "relative": self.relative, "survived": self.survived,
            "changed": self.changed, "largest_change": self.largest_change,
        }  # fmt: skip


def check_merged(stats: Mapping[str, MergeStats], allow_unchanged: bool, updated: Iterable[str] | None = None) -> None:
    """Raise MergeError for merged weights that are not finite, and for those of `updated` (default: all) that came out of it
    unchanged."""
    broken = [n for n, s in stats.items() if not math.isfinite(s.largest_change)]
    if broken:
        raise MergeError(
            listing(
                f"{len(broken)} of {len(stats)} merged weights would not be finite (NaN or infinity): ΔW is not, or the sum "
                "is too large for the weight's dtype:",
                broken,
            )
        )
    same = [n for n in (stats if updated is None else updated) if stats[n].changed == 0.0]
    if same and not allow_unchanged:
        problems = [
            f"{n}: " + ("ΔW is zero (was it trained?)" if not stats[n].dw_norm else "its dtype rounds ΔW away")
            for n in same
        ]
        raise MergeError(
            listing(f"{len(same)} of {len(stats)} targeted weights would come out of the merge unchanged:", problems)
        )
