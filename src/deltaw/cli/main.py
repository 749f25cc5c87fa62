"""argv → a command's dataclass → its function. Our errors become one message and their exit code."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence

import tyro

from deltaw import __version__
from deltaw.cli.flags import COMMANDS, Train, check_flags, train_with
from deltaw.cli.synonyms import answer
from deltaw.cli.usage import folded_help, registry
from deltaw.config import from_mapping, keys, read_yaml
from deltaw.errors import ConfigError, DeltaWError, FileError, nearest, visible

_DESCRIPTION = (
    "ΔW: train, keep, switch, merge and exactly undo low-rank updates of pretrained models. `deltaw train MODEL DATA` begins; "
    "`deltaw COMMAND --help` has a command's flags, `deltaw --version` the version. Exit codes: 0 it worked, 2 settings, "
    "3 targets, 4 adapters, 5 files, 6 data, 7 training, 130 Ctrl-C, 143 SIGTERM (docs/errors.md)."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default the process's, and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["version"]):
        print(f"deltaw {__version__}")
        return 0
    try:
        command = parse(arguments)
        return importlib.import_module(f"deltaw.cli.{type(command).__name__.lower()}").run(command) or 0
    except DeltaWError as error:
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


def parse(arguments: list[str]) -> object:
    """Return the command's dataclass.

    Raises ConfigError for a flag that it does not have. tyro exits with 2 for a wrong value.
    """
    path, words = _taken(arguments, "config") if arguments[:1] == ["train"] else (None, arguments)
    resume = _taken(arguments, "resume")[0] if arguments[:1] == ["train"] else None
    if resume is not None:
        if path is not None:
            raise ConfigError(
                "--config and --resume cannot be used together: a run is resumed with its own config.yaml."
            )
        from deltaw.runs.resume.asked import settings_file  # imports torch

        path = str(settings_file(resume))
    values = read_yaml(path) if path is not None else {}
    if resume is not None:
        values |= {"out": resume, "overwrite": False}
    train = train_with(_taken(words, "method")[0] or str(values.get("method", "lora")))
    commands = {**COMMANDS, "train": train}
    if arguments and not arguments[0].startswith("-"):
        check_flags(_command(arguments[0]), commands[arguments[0]], arguments[1:])
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    with registry, folded_help():
        if path is not None:
            default = _with_values(train, values, path)
            chosen = tyro.cli(train, prog="deltaw train", args=words[1:], default=default, config=flat)
            _check_trust(values, chosen, path)
            return dataclasses.replace(chosen, config=path if resume is None else None)
        return tyro.extras.subcommand_cli_from_dict(
            dict[str, Callable[..., object]](commands),
            prog="deltaw",
            description=_DESCRIPTION,
            args=arguments or ["--help"],
            config=flat,
        )


def _command(word: str) -> str:
    if word not in COMMANDS:
        raise ConfigError(f"There is no command {word!r}{nearest(word, COMMANDS)}. Commands: {', '.join(COMMANDS)}.")
    return word


def _taken(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of one flag, and the arguments without it.

    train's --method and --config come first: they decide which settings there are, and their defaults.
    """
    for i, word in enumerate(arguments):
        if word == f"--{flag}" and i + 1 < len(arguments):
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if word.startswith(f"--{flag}="):
            return word.removeprefix(f"--{flag}="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _check_trust(values: dict[str, object], chosen: Train, path: str) -> None:
    """Raise ConfigError where a file says that the model's code may run and the command line does not.

    Such a file may come from the same stranger as the model.
    """
    if values.get("trust_remote_code") and not chosen.run.trust_remote_code:
        raise ConfigError(
            f"{path} asks to run the Python code that comes with {chosen.model}, which a file cannot allow. If you trust that "
            "code, pass --trust-remote-code too; else take the setting out of the file."
        )


def _with_values(cls: type[Train], values: dict[str, object], path: str) -> Train:
    """The defaults that a YAML file sets."""
    named: dict[str, object] = {"model": "", "data": ""}
    known = {*keys(cls), "MODEL", "DATA"}
    train = from_mapping(cls, named | values, where=path, meaning=lambda key: answer(key, known, str.lower))
    train = dataclasses.replace(train, run=dataclasses.replace(train.run, trust_remote_code=False))
    required = {name: tyro.MISSING for name in named if not values.get(name)}
    return dataclasses.replace(train, **required)
