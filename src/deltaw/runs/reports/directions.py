"""How alike the directions of adapters are, as tables and maps of a report. Knows what runs/directions.py found; no models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.runs.reports.page import HeatMap, Table

Values = Mapping[str, Any]

_PHI = (
    "φ(i, j) is 1 where the first i directions of one hold the first j of the other or the other way round, 0 where they have "
    "nothing in common (section 7.2 of the paper, which looks at A: there the first directions of r = 8 and of r = 64 have more "
    "than 0.5 in common). Directions of ΔW are its right singular vectors."
)


def alike_tables(found: Sequence[Values]) -> list[Table]:
    """One for each pair of adapters."""
    return [_table(each) for each in found]


def _table(each: Values) -> Table:
    least = min(each["rank"], each["other_rank"])
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
        [row["layers"], row["count"], f"{row['first']:.3f}", f"{row['all']:.3f}",
         f"{row['first_by_chance']:.3f}, {row['all_by_chance']:.3f}", f"{row['first_of_A']:.3f}", f"{row['all_of_A']:.3f}"]
        for row in each["rows"]
    ]  # fmt: skip
    title = f"Directions of r = {each['rank']} in common with {each['with']}"
    return Table(title, columns, rows, note=_PHI)


def alike_maps(found: Sequence[Values]) -> list[HeatMap]:
    """Of each pair of adapters those of the layers that stand for all."""
    return [
        HeatMap(
            f"φ(i, j) of ΔW, {_placed(m['layer'])}", f"j, of {each['with']}", f"i, of r = {each['rank']}", m["values"]
        )
        for each in found
        for m in each["maps"]
    ]


def _placed(name: str) -> str:
    """The last two parts of a layer's name, with the block's number where it has one."""
    number = re.findall(r"\b\d+\b", name)
    return ".".join(name.split(".")[-2:]) + (f", block {number[0]}" if number else "")
