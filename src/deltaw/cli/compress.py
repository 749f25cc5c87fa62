"""`deltaw compress`: an adapter cut to fewer directions, and the error of that."""

from __future__ import annotations

import dataclasses

from deltaw.cli import show
from deltaw.cli.flags import Compress
from deltaw.cli.merge import new_folder
from deltaw.files import units


def run(command: Compress) -> None:
    """Run the command."""
    show.quiet_libraries()
    out = new_folder(command.out, command.overwrite)
    from deltaw.files.compress import compress

    compressed = compress(command.adapter, out, rank=command.rank, energy=command.energy, size=command.bytes)
    if command.json:
        print(show.as_json(dataclasses.asdict(compressed) | {"path": str(compressed.path)}))
        return
    show.out.print(
        show.errors_of_layers(compressed.ranks, compressed.errors, "‖ΔW − ΔW'‖ / ‖ΔW‖", every=command.all_layers)
    )
    show.out.print(
        f"\nAdapter: {compressed.path}  {units.size(compressed.bytes)}, before {units.size(compressed.bytes_before)}; over all "
        f"layers ‖ΔW − ΔW'‖ / ‖ΔW‖ = {compressed.error:.3f}",
        soft_wrap=True,
    )
