"""`deltaw unmerge`: the base, from a merged model folder and the adapter in it."""

from __future__ import annotations

from deltaw.cli import show
from deltaw.cli.flags import Unmerge
from deltaw.cli.merge import new_folder


def run(command: Unmerge) -> None:
    """Run the command."""
    show.quiet_libraries()
    out = new_folder(command.out, command.overwrite)
    from deltaw.files.merge import unmerge_files

    unmerged = unmerge_files(command.merged, command.adapter, out)
    show.out.print(f"Base: {out}  ({unmerged.layers} layers restored)", soft_wrap=True)
    if unmerged.corrected:
        show.out.print("Every file has the bytes of the base's: its sha256 is the same.", soft_wrap=True)
    elif unmerged.exact:
        show.out.print(
            "There is no correction file, but the layers' weights are the base's bit for bit, by the fingerprint in the adapter.",
            soft_wrap=True,
        )
    else:
        show.out.print(
            "There is no correction file: ΔW was subtracted, and an entry can differ from the base's by up to "
            f"{unmerged.largest_error:.1e}. "
            "Merge with --reversible to get the base's bytes back.",
            style="yellow", soft_wrap=True,
        )  # fmt: skip
