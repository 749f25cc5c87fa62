"""argv → a command's dataclass → its function. Our errors become one message and their exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from deltaw import __version__
from deltaw.cli.words import parse
from deltaw.errors import ConfigError, DeltaWError, FileError, visible


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default the process's, and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["version"]):
        print(f"deltaw {__version__}")
        return 0
    try:
        command = parse(arguments)
        if command is None:  # help, which is printed
            return 0
        _check_alone(command)
        return importlib.import_module(f"deltaw.cli.{type(command).__name__.lower()}").run(command) or 0
    except DeltaWError as error:
        if not error.is_told:
            print(visible(f"\ndeltaw: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ndeltaw: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:  # no space or no permission, which the user can mend
        message = f"\ndeltaw: {error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        print(visible(message), file=sys.stderr)
        return FileError.exit_code


def _check_alone(command: object) -> None:
    """Raise ConfigError where a launcher started several processes of a command that is for one. The first one tells."""
    name, ranks = type(command).__name__.lower(), os.environ
    if name == "train" or int(ranks.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in ranks:
        return
    error = ConfigError(
        f"deltaw {name} runs in one process, and a launcher started {ranks['WORLD_SIZE']}: several train, and nothing else."
    )
    error.is_told = ranks.get("RANK") != "0"
    raise error
