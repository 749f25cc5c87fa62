"""`deltaw compress`: an adapter cut to fewer directions, and what that loses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from deltaw import units
from deltaw.cli import show
from deltaw.cli.flags import Compress
from deltaw.cli.merge import new_folder


def run(command: Compress) -> None:
    show.quiet_libraries()
    out = new_folder(command.out, command.overwrite)
    from deltaw.compressed import compress

    done = compress(command.adapter, out, rank=command.rank, energy=command.energy, size=command.bytes)
    if command.json:
        print(json.dumps(dataclasses.asdict(done) | {"path": str(done.path)}, indent=1, ensure_ascii=False))
        return
    show.out.print(_table(done, command.all_layers))
    show.out.print(
        f"\nAdapter: {done.path}  {units.size(done.bytes)}, before {units.size(done.bytes_before)}; over all layers "
        f"‖ΔW − ΔW'‖ / ‖ΔW‖ = {done.error:.3f}",
        soft_wrap=True,
    )


def _table(done: Any, all_layers: bool) -> Any:
    """A line for layers that differ in their number alone."""
    from deltaw.names import family

    groups: dict[str, list[str]] = {}
    for layer in done.ranks:
        groups.setdefault(layer if all_layers else family(layer), []).append(layer)
    made = show.table("layers", "count", "rank", "error", "largest error", title="‖ΔW − ΔW'‖ / ‖ΔW‖")
    for name, layers in groups.items():
        errors = [done.errors[layer] for layer in layers]
        ranks = sorted({done.ranks[layer] for layer in layers})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        made.add_row(name, str(len(layers)), shown, f"{sum(errors) / len(errors):.3f}", f"{max(errors):.3f}")
    return made
