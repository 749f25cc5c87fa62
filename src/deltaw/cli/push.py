"""`deltaw push`: an adapter folder into a repository on the hub."""

from __future__ import annotations

from deltaw.cli import show
from deltaw.cli.flags import Push
from deltaw.files import units


def run(command: Push) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.files.publish import push

    push.check_repo(command.repo)
    packed = push.package(command.adapter, base=command.base)
    sizes = packed.sizes()
    table = show.table("file", "size", title=f"{'Would go' if command.dry_run else 'Goes'} to {command.repo}")
    for name, size in sizes.items():
        table.add_row(name, units.size(size))
    table.add_row("all", units.size(sum(sizes.values())))
    show.out.print(table)
    if packed.left:
        show.out.print(f"Left here, since it is none of an adapter's: {', '.join(packed.left)}", soft_wrap=True)
    if packed.base is None or "/" not in packed.base or packed.base.startswith("./"):
        show.err.print(
            f"The base is named {packed.base or 'nowhere'}: --base ORG/MODEL gives its id on the hub, which others need to "
            "open the adapter.",
            soft_wrap=True,
        )
    if command.dry_run:
        show.out.print("Nothing was pushed (--dry-run).")
        return
    address = push.push(push.client(), packed, command.repo, private=command.private)
    show.out.print(f"Pushed: {address}", soft_wrap=True)
