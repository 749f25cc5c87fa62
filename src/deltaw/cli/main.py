"""argv → a command's dataclass → its function. Errors of ours become one message and their exit code."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from deltaw.cli.flags import COMMANDS, Train, check_flags
from deltaw.config import from_mapping
from deltaw.errors import ConfigError, DeltaWError, FileError, nearest
from deltaw.version import __version__

_DESCRIPTION = "ΔW: train, keep, switch, merge and exactly undo low-rank updates of pretrained models."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["version"]):
        print(f"deltaw {__version__}")
        return 0
    try:
        command = parse(arguments)
        return importlib.import_module(f"deltaw.cli.{type(command).__name__.lower()}").run(command) or 0
    except DeltaWError as error:
        print(f"\ndeltaw: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ndeltaw: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:  # no space, no permission: the folder is to blame, not us
        print(f"\ndeltaw: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return FileError.exit_code


def parse(arguments: list[str]) -> Any:
    """The command's dataclass. Raises ConfigError for a flag that it does not have; tyro exits with 2 for a wrong value."""
    if arguments and not arguments[0].startswith("-"):
        check_flags(_command(arguments[0]), arguments[1:])
    flat: Any = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    path, arguments = _take_config(arguments)
    if path is not None:
        chosen = tyro.cli(Train, prog="deltaw train", args=arguments[1:], default=_from_yaml(path), config=flat)
        return dataclasses.replace(chosen, config=path)
    return tyro.extras.subcommand_cli_from_dict(
        dict(COMMANDS), prog="deltaw", description=_DESCRIPTION, args=arguments or ["--help"], config=flat
    )


def _command(word: str) -> str:
    if word not in COMMANDS:
        raise ConfigError(f"There is no command {word!r}{nearest(word, COMMANDS)}. Commands: {', '.join(COMMANDS)}.")
    return word


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """`--config FILE` of train is read before the flags, whose defaults it sets."""
    if arguments[:1] != ["train"]:
        return None, arguments
    for i, word in enumerate(arguments):
        if word == "--config" and i + 1 < len(arguments):
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if word.startswith("--config="):
            return word.removeprefix("--config="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _from_yaml(path: str) -> Train:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings, one `key: value` a line.")
    train = from_mapping(Train, {"model": "", "data": ""} | values, where=path)
    required = {name: tyro.MISSING for name in ("model", "data") if not values.get(name)}
    return dataclasses.replace(train, **required)
