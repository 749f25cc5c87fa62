"""`deltaw verify`: a check of an adapter against its base, or of a merged model against base and adapter."""

from __future__ import annotations

from deltaw.cli import show
from deltaw.cli.flags import Verify
from deltaw.errors import ConfigError


def run(command: Verify) -> None:
    """Run the command."""
    show.quiet_libraries()
    if command.of is not None and command.base is None and command.adapter is None:
        from deltaw.files.verify import verify_adapter

        how = "bit for bit" if verify_adapter(command.model, command.of) == "same" else "in another precision"
        show.out.print(f"Yes: {command.of} was trained on the weights of {command.model}, {how}.", soft_wrap=True)
    elif command.of is None and command.base is not None and command.adapter is not None:
        from deltaw.files.verify import verify_merged

        layers = verify_merged(command.model, command.base, command.adapter)
        show.out.print(
            f"Yes: {command.model} is {command.base} with {command.adapter} merged into {layers} layers, bit for bit.",
            soft_wrap=True,
        )
    else:
        raise ConfigError(
            "verify takes a model and an adapter, or a merged model with --base and --adapter:\n"
            "  deltaw verify MODEL ADAPTER\n  deltaw verify MERGED --base MODEL --adapter ADAPTER"
        )
