"""`deltaw compress`: an adapter cut to fewer directions, and what that loses."""

from __future__ import annotations

import dataclasses
import json

from deltaw.cli import show
from deltaw.cli.flags import Compress
from deltaw.cli.merge import new_folder
from deltaw.files import units


def run(command: Compress) -> None:
    show.quiet_libraries()
    out = new_folder(command.out, command.overwrite)
    from deltaw.files.compress import compress

    done = compress(command.adapter, out, rank=command.rank, energy=command.energy, size=command.bytes)
    if command.json:
        print(json.dumps(dataclasses.asdict(done) | {"path": str(done.path)}, indent=1, ensure_ascii=False))
        return
    show.out.print(show.errors_of_layers(done.ranks, done.errors, "‖ΔW − ΔW'‖ / ‖ΔW‖", every=command.all_layers))
    show.out.print(
        f"\nAdapter: {done.path}  {units.size(done.bytes)}, before {units.size(done.bytes_before)}; over all layers "
        f"‖ΔW − ΔW'‖ / ‖ΔW‖ = {done.error:.3f}",
        soft_wrap=True,
    )
