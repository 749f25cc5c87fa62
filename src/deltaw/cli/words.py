"""The words of a command line → a command's dataclass. click takes them apart; config.py checks the values.

Everything wrong with them is one ConfigError, which ends in the command's usage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from deltaw.cli import synonyms
from deltaw.cli.flags import COMMANDS, Train, train_with
from deltaw.cli.usage import SETTINGS, Contents, Flag, Page, arguments, flags_of
from deltaw.config import from_mapping, keys, read_yaml, to_mapping
from deltaw.errors import ConfigError, nearest
from deltaw.methods.documented import sentences
from deltaw.methods.registry import METHODS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def parse(words: Sequence[str]) -> object:
    """Return the command's dataclass; None where the words asked for help, which is then printed.

    Raises ConfigError with everything that is wrong.
    """
    words = [_dashed(word) for word in words] or ["--help"]
    path, values = _of_file(words) if words[0] == "train" else (None, {})
    train = train_with(_value(words, "method") or str(values.get("method", "lora")))
    commands = {**COMMANDS, "train": train}
    name = words[0]
    if not name.startswith("-"):
        if name not in commands:
            meant = synonyms.COMMANDS.get(name.replace("-", "_"))
            near = f": it is {meant} here" if meant else nearest(name, commands)
            raise ConfigError(f"There is no command {name!r}{near}. Commands: {', '.join(commands)}.")
        flags = list(flags_of(commands[name]))
        _check_flags(name, flags, words[1:])
        words = [name, *_spread(words[1:], {flag.word for flag in flags if flag.is_list})]
    if path is not None:
        _check_file(train, values, path)
    try:
        command: object = _Words(commands, values, path).main(words, "deltaw", standalone_mode=False)
    except click.ClickException as error:
        advice = "See deltaw --help." if name.startswith("-") else usage(name, commands[name])
        raise ConfigError("The command line cannot be read:", [error.format_message()], advice) from error
    return command if dataclasses.is_dataclass(command) else None


class _Words(Contents):
    """The commands, each made when it is asked for. `values` are a file's, for train."""

    def __init__(
        self, commands: Mapping[str, type[DataclassInstance]], values: Mapping[str, object], path: str | None
    ) -> None:
        super().__init__("deltaw", context_settings=SETTINGS)
        self.classes, self.values, self.path = commands, values, path

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self.classes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command of click, which returns its dataclass."""
        cls = self.classes.get(cmd_name)
        if cls is None:
            return None
        flags = list(flags_of(cls))
        page = Page(cmd_name, cls, flags, [_parameter(flag) for flag in flags])
        of_file = self.values if cmd_name == "train" else {}
        page.callback = lambda **texts: _made(cmd_name, cls, flags, texts, of_file, self.path)
        return page


class _OneOf(click.Choice[str]):
    """Choices for shell completion. A wrong one is told with everything else that is wrong."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value as it is."""
        return value


def _parameter(flag: Flag) -> click.Parameter:
    if flag.positional:
        return click.Argument([flag.name], required=False, metavar=flag.positional)
    if bool in flag.kinds:
        return click.Option([flag.name, f"{flag.word}/--no-{flag.word[2:]}"], default=None)
    kind = _OneOf(flag.choices) if flag.choices else click.STRING
    return click.Option(
        [flag.name, *filter(None, [flag.short]), flag.word], type=kind, multiple=flag.is_list, default=None
    )


def _made(
    name: str,
    cls: type[DataclassInstance],
    flags: Sequence[Flag],
    texts: Mapping[str, object],
    of_file: Mapping[str, object],
    path: str | None,
) -> object:
    """Return the dataclass from the texts that were given, then a file's values, then the defaults."""
    there = {key: text for key, text in texts.items() if text is not None and text != ()}
    if of_file.get("trust_remote_code") and not there.get("trust_remote_code"):
        raise ConfigError(
            f"{path} asks to run the Python code that comes with {there.get('model', of_file.get('model'))}, which a file "
            "cannot allow. If you trust that code, pass --trust-remote-code too; else take the setting out of the file."
        )
    by_name = {flag.name: flag for flag in flags}
    values = _defaults(cls) | dict(of_file) | {key: _typed(text, by_name[key]) for key, text in there.items()}
    missing = [flag for flag in flags if flag.default is dataclasses.MISSING and not values.get(flag.name)]
    problems = [f"{flag.word}: {sentences(flag.text)[0]}" for flag in missing]
    try:
        command = from_mapping(cls, values | {flag.name: flag.word for flag in missing}, where="")
    except ConfigError as error:
        heading = (
            "These settings cannot be used, and arguments are missing:"
            if problems
            else "These settings cannot be used:"
        )
        raise ConfigError(heading, [*problems, *error.problems], usage(name, cls)) from error
    if problems:
        raise ConfigError("These arguments are missing:", problems, usage(name, cls))
    return command


def _defaults(cls: type[DataclassInstance]) -> dict[str, object]:
    """Return the values of a command's settings, where they are others than the settings' own."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(cls):
        settings: object = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
            values |= to_mapping(settings)
    return values


def _typed(text: object, flag: Flag) -> object:
    """Return a flag's text as a whole number or a list where it is to be one. config.py takes texts for other numbers."""
    if isinstance(text, tuple):
        return list(text)
    if isinstance(text, str) and int in flag.kinds and str not in flag.kinds:
        with contextlib.suppress(ValueError):
            return int(text)
    return text


def usage(name: str, cls: type[DataclassInstance]) -> str:
    """Return the line that an error ends in."""
    return f"Usage: deltaw {name} {arguments(list(flags_of(cls)))} [flags]; see deltaw {name} --help."


def _dashed(word: str) -> str:
    """Return a flag with dashes; underscores are taken for them, and values stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _value(words: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag that decides which others there are, or their defaults."""
    for i, word in enumerate(words):
        if word == f"--{flag}" and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"--{flag}="):
            return word.removeprefix(f"--{flag}=")
    return None


def _spread(words: Sequence[str], lists: Collection[str]) -> list[str]:
    """Return the words with a flag before each value of a list: `--labels a b` as `--labels a --labels b`."""
    spread: list[str] = []
    of_list = ""
    for word in words:
        if word.startswith("-") and len(word) > 1:
            of_list = word if word in lists else ""
        elif of_list and spread[-1] != of_list:
            spread.append(of_list)
        spread.append(word)
    return spread


def _of_file(words: Sequence[str]) -> tuple[str | None, dict[str, object]]:
    """Return the file that train's settings are in besides, and its values: that of --config, or of the run to resume."""
    path, resume = _value(words, "config"), _value(words, "resume")
    if resume is None:
        return path, {} if path is None else read_yaml(path)
    if path is not None:
        raise ConfigError("--config and --resume cannot be used together: a run is resumed with its own config.yaml.")
    from deltaw.runs.resume.asked import settings_file  # imports torch

    path = str(settings_file(resume))
    return path, read_yaml(path) | {"out": resume, "overwrite": False}


def _check_file(cls: type[Train], values: Mapping[str, object], path: str) -> None:
    """Raise one ConfigError with everything that is wrong with a file's settings."""
    known = {*keys(cls), "MODEL", "DATA"}
    named = {"model": "", "data": ""}
    from_mapping(cls, {**named, **values}, where=path, meaning=lambda key: synonyms.answer(key, known, str.lower))


def _check_flags(name: str, flags: Sequence[Flag], words: Sequence[str]) -> None:
    """Raise one ConfigError with every flag in `words` that the command does not have."""
    positional = {flag.name: flag.positional for flag in flags if flag.positional}
    known = {"help"} | {flag.word[2:] for flag in flags if not flag.positional}
    short = {flag.short: flag for flag in flags if flag.short}
    takes_value = {flag.word for flag in flags if bool not in flag.kinds} | {
        s for s, f in short.items() if bool not in f.kinds
    }
    problems, before = [], ""
    for word in words[: words.index("--") if "--" in words else None]:
        is_value, before = before in takes_value, word
        text = word.removeprefix("--").split("=")[0]
        if not word.startswith("--"):
            if not is_value and _SHORT.fullmatch(word) and word not in short and word != "-h":
                problems.append(f"unknown flag {word}{_one_dash(word[1:], known, name)}")
        elif text in positional:
            problems.append(f"--{text} is no flag: {positional[text]} stands by itself")
        elif text not in known and text.removeprefix("no-") not in known:
            problems.append(f"unknown flag --{text}{_meant(text, known, positional, name)}")
    if problems:
        words_of_usage = f"Usage: deltaw {name} {arguments(flags)} [flags]; see deltaw {name} --help."
        raise ConfigError("These flags cannot be used:", problems, words_of_usage)


# A flag with one dash, and no number
_SHORT = re.compile(r"-[A-Za-z][\w-]*")
_ONE_LETTER = {
    "o": "out", "m": "model", "d": "data", "r": "rank", "b": "batch", "e": "epochs", "c": "config", "p": "prompt", "s": "seed",
    "n": "max-new-tokens",
}  # fmt: skip


def _one_dash(flag: str, known: Collection[str], command: str) -> str:
    """Return what a flag with one dash is here, as the end of a sentence."""
    flag = _ONE_LETTER.get(flag, flag)
    return f": it is --{flag} here" if flag in known else _meant(flag, known, {}, command)


def _meant(flag: str, known: Collection[str], positional: Mapping[str, str], command: str) -> str:
    """Return what a flag that `command` does not have is here, as the end of a sentence."""
    # litgpt has settings in groups: --train.epochs
    if (plain := flag.lower().rpartition(".")[2]) in known:
        return f": it is --{plain} here"
    key = flag.replace("-", "_")
    if command == "train" and (others := [m for m in METHODS if key in keys(train_with(m))]):
        return f" (a setting of --method {' or '.join(others)})"
    settings = {k.replace("-", "_") for k in known} | set(positional.values())
    if said := synonyms.answer(flag, settings, lambda setting: "--" + setting.replace("_", "-")):
        return said
    meaning = synonyms.meaning_of(flag)
    setting = key if meaning is None or meaning.setting is None else meaning.setting
    if elsewhere := [name for name, cls in COMMANDS.items() if setting in keys(cls)]:
        return f": --{setting.replace('_', '-')} is a flag of deltaw {', '.join(elsewhere)}"
    near = nearest(flag.lower(), known, cutoff=0.7)
    return near.replace("'", "'--", 1) if near.count("'") == 2 else near.replace(" '", " '--")
