"""`deltaw extract`: a low-rank adapter out of a model that was fine-tuned whole."""

from __future__ import annotations

from deltaw.cli import show
from deltaw.cli.flags import Extract
from deltaw.cli.merge import new_folder


def run(command: Extract) -> None:
    show.quiet_libraries()
    out = new_folder(command.out, command.overwrite)
    from deltaw.files.store import save
    from deltaw.model.extract import extract
    from deltaw.model.pretrained import load_pretrained

    base = load_pretrained(command.base, device="cpu").model
    tuned = load_pretrained(command.tuned, device="cpu").model
    found = extract(base, tuned, rank=command.rank, energy=command.energy, targets=command.targets)
    save(base, out)
    show.out.print(
        show.errors_of_layers(found.ranks, found.errors, "‖(W − W0) − BA‖ / ‖W − W0‖", every=command.all_layers)
    )
    show.out.print(f"\nAdapter: {out}  ({len(found.ranks)} layers)", soft_wrap=True)
    if found.unchanged:
        show.out.print(f"{len(found.unchanged)} targeted layers are equal in both models and have no update.")
    if found.others:
        few = ", ".join(found.others[:4]) + (" …" if len(found.others) > 4 else "")
        show.out.print(
            f"{len(found.others)} other parameters differ too, and are not in the adapter: {few}",
            style="yellow",
            soft_wrap=True,
        )
