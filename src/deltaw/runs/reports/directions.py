"""The likeness of directions of adapters, as tables and maps of a report. Knows results; no models."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deltaw.runs.reports.page import HeatMap, Table
from deltaw.runs.results.directions import Alike

_PHI = (
    "φ(i, j) is 1 where the first i directions of one hold the first j of the other or the other way round, 0 where they have "
    "nothing in common (section 7.2 of the paper, which looks at A: there the first directions of r = 8 and of r = 64 have more "
    "than 0.5 in common). Directions of ΔW are its right singular vectors."
)


def alike_tables(pairs: Sequence[Alike]) -> list[Table]:
    """Return a table for each pair of adapters."""
    return [_table(pair) for pair in pairs]


def _table(pair: Alike) -> Table:
    least = min(pair.rank, pair.other_rank)
    columns = [
        "layers",
        "count",
        "φ(1, 1)",
        f"φ({least}, {least})",
        "by chance",
        "of A: φ(1, 1)",
        f"of A: φ({least}, {least})",
    ]
    rows = [
        [row.layers, row.count, f"{row.first:.3f}", f"{row.all:.3f}", f"{row.first_by_chance:.3f}, {row.all_by_chance:.3f}",
         f"{row.first_of_A:.3f}", f"{row.all_of_A:.3f}"]
        for row in pair.rows
    ]  # fmt: skip
    return Table(f"Directions of r = {pair.rank} in common with {pair.other}", columns, rows, note=_PHI)


def alike_maps(pairs: Sequence[Alike]) -> list[HeatMap]:
    """Return the maps of each pair of adapters, of the layers that stand for all."""
    return [
        HeatMap(f"φ(i, j) of ΔW, {_place(m.layer)}", f"j, of {pair.other}", f"i, of r = {pair.rank}", m.values)
        for pair in pairs
        for m in pair.maps
    ]


def _place(name: str) -> str:
    """Return the last two parts of a layer's name, with the block's number where it has one."""
    number = re.findall(r"\b\d+\b", name)
    return ".".join(name.split(".")[-2:]) + (f", block {number[0]}" if number else "")
