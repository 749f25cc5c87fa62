"""`deltaw extract`: a low-rank adapter from a fully fine-tuned model."""

from __future__ import annotations

from deltaw.cli import show
from deltaw.cli.flags import Extract
from deltaw.cli.merge import new_folder
from deltaw.errors import shown


def run(command: Extract) -> None:
    """Run the command."""
    show.quiet_libraries()
    out = new_folder(command.out, command.overwrite)
    from deltaw.files.formats.atomic import check_apart
    from deltaw.files.formats.peft import check_adapter_place
    from deltaw.files.store import save
    from deltaw.model.extract import extract
    from deltaw.model.pretrained import load_pretrained

    check_apart(out, {"the base": command.base, "the tuned model": command.tuned})
    check_adapter_place(out)
    trust = command.trust_remote_code
    base = load_pretrained(command.base, device="cpu", trust_remote_code=trust).model
    tuned = load_pretrained(command.tuned, device="cpu", trust_remote_code=trust).model
    extracted = extract(base, tuned, rank=command.rank, energy=command.energy, targets=command.targets)
    save(base, out)
    show.out.print(
        show.errors_of_layers(extracted.ranks, extracted.errors, "‖(W − W0) − BA‖ / ‖W − W0‖", every=command.all_layers)
    )
    show.out.print(f"\nAdapter: {out}  ({len(extracted.ranks)} layers)", soft_wrap=True)
    if extracted.unchanged:
        show.out.print(f"{len(extracted.unchanged)} targeted layers are equal in both models and have no update.")
    if extracted.others:
        few = shown(extracted.others, 4)
        show.out.print(
            f"{len(extracted.others)} other parameters differ too and are not in the adapter: {few}",
            style="yellow",
            soft_wrap=True,
        )
