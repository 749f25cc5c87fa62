"""Help: a command's flags in named groups, the common ones first, each in a sentence, and an example that runs.

Knows the fields of the commands' dataclasses and click's formatter. Reads no command line.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from deltaw.cli.flags import (
    CHOICES,
    COMMANDS,
    COMMON,
    EXAMPLES,
    NOT_TAKEN,
    OTHER_TEXTS,
    SECTIONS,
    Opening,
    Positional,
    Short,
)
from deltaw.config import CompareConfig, DataConfig, GenerateConfig, PlanConfig, RankConfig, SweepConfig, TrainConfig
from deltaw.errors import visible
from deltaw.methods.documented import field_texts, in_order, sentences
from deltaw.methods.plan import Method

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WIDEST = 120
"""Columns that a line of help takes at most."""
_LEFT = 30  # columns of the flags, beside their texts
_ROOM = 26  # of the choices of a flag; more of them stand in its text
_BY_NAME = {
    "adapter": "FOLDER", "base": "FOLDER", "out": "PATH", "config": "FILE", "file": "FILE", "valid": "FILE|SPLIT",
    "test": "FILE|SPLIT", "records": "FILE|SPLIT", "model": "MODEL", "data": "DATA", "memory": "SIZE", "bytes": "SIZE",
    "device": "DEVICE", "labels": "NAME [NAME …]", "resume": "FOLDER", "start": "FOLDER", "prompt_file": "FILE",
}  # fmt: skip
_BY_TYPE: dict[object, str] = {str: "TEXT", int: "N", float: "NUMBER"}
_TITLES: dict[type, str] = {
    DataConfig: "Records", GenerateConfig: "Completions", Opening: "Model", CompareConfig: "Comparison", SweepConfig: "Sweep",
    RankConfig: "Ranks", PlanConfig: "Plan",
}  # fmt: skip
"""Settings → the title of their flags. Those of TrainConfig have several."""
_OF_TRAINING = {
    "Optimization": "schedule warmup minutes batch_tokens micro_batch share clip optimizer weight_decay lr_ratio "
    "skip_bad_steps seed",
    "Held-out records": "valid valid_share valid_most eval_every patience samples",
    "Machine": "dtype frozen_dtype device gradient_checkpointing trust_remote_code",
    "Run folder": "overwrite start save_every log_every track",
}
_ORDER = (
    "Arguments", "Common", "Flags", "Method", "Comparison", "Sweep", "Ranks", "Plan", "Optimization", "Held-out records",
    "Records", "Completions", "Model", "Machine", "Run folder",
)  # fmt: skip
_TITLE_OF = {name: title for title, names in _OF_TRAINING.items() for name in names.split()}


@dataclass(frozen=True)
class Flag:
    """A field of a command, or of the settings in it, as the command line has it."""

    name: str
    hint: object
    """Its type, without our marks."""
    default: object
    """Its value where it is not given; MISSING where it must be."""
    text: str
    owner: type
    marks: Sequence[object] = ()

    @property
    def word(self) -> str:
        """The flag, or the word in capitals of an argument without one."""
        return self.positional or "--" + self.name.replace("_", "-")

    @property
    def positional(self) -> str | None:
        """The word in capitals of an argument without a flag."""
        return next((mark.metavar for mark in self.marks if isinstance(mark, Positional)), None)

    @property
    def short(self) -> str | None:
        """The short form, for example -o."""
        return next((mark.flag for mark in self.marks if isinstance(mark, Short)), None)

    @property
    def kinds(self) -> tuple[object, ...]:
        """The types that a value may have."""
        union = typing.get_origin(self.hint) in (typing.Union, types.UnionType)
        return typing.get_args(self.hint) if union else (self.hint,)

    @property
    def choices(self) -> list[str]:
        """The values of a flag that takes only some."""
        return [str(c) for kind in self.kinds if typing.get_origin(kind) is Literal for c in typing.get_args(kind)]

    @property
    def is_list(self) -> bool:
        """True if several values may stand after it."""
        return any(typing.get_origin(kind) is list for kind in self.kinds)


def flags_of(cls: type[DataclassInstance]) -> Iterator[Flag]:
    """Yield every flag and argument of a command; those of the settings in it stand in their place."""
    for flag in _fields(cls):
        if flag.name not in NOT_TAKEN.get(cls.__name__, ()):
            yield dataclasses.replace(flag, text=OTHER_TEXTS.get((cls.__name__, flag.name), flag.text))


def _fields(cls: type[DataclassInstance], default: object = None) -> Iterator[Flag]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in in_order(cls):
        hint, *marks = (
            typing.get_args(hints[field.name]) if hasattr(hints[field.name], "__metadata__") else (hints[field.name],)
        )
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = value if default is None else getattr(default, field.name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _fields(hint, value)
        else:
            yield Flag(field.name, hint, value, field_texts(cls).get(field.name, ""), cls, marks)


def groups(command: str, flags: Sequence[Flag]) -> Mapping[str, list[Flag]]:
    """Return the flags by the titles that they stand under: what is used most often first."""
    common = COMMON.get(command, "").split()
    by_name = {flag.name: flag for flag in flags}
    titled: dict[str, list[Flag]] = {title: [] for title in _ORDER}
    titled["Common"] = [by_name[name] for name in common if name in by_name]
    for flag in flags:
        if flag.positional:
            titled["Arguments"].append(flag)
        elif flag.name not in common:
            titled.setdefault(_title(flag), []).append(flag)
    return {title: members for title, members in titled.items() if members}


def _title(flag: Flag) -> str:
    if issubclass(flag.owner, Method):
        return "Method"
    if flag.owner is TrainConfig:
        return _TITLE_OF.get(flag.name, "Run folder")
    return _TITLES.get(flag.owner, "Flags")


def _left(flag: Flag) -> str:
    """Return the flag with the word for its value."""
    if flag.positional:
        return flag.positional
    word = f"{flag.short}, {flag.word}" if flag.short else flag.word
    if bool in flag.kinds:
        return f"{word} / --no-{word[2:]}" if flag.default is True else word
    return f"{word} {_metavar(flag)}"


def _metavar(flag: Flag) -> str:
    if flag.choices:
        return "|".join(flag.choices) if _are_short(flag) else "NAME"
    kind = next(kind for kind in flag.kinds if kind is not types.NoneType)
    named = _BY_NAME.get(flag.name) if kind is str or flag.is_list else None
    return named or _BY_TYPE.get(kind, "TEXT")


def _are_short(flag: Flag) -> bool:
    return len("|".join(flag.choices)) <= _ROOM


def _right(flag: Flag) -> str:
    """Return the first sentence of the flag's text, the names that it takes, and its default."""
    first, *more = sentences(flag.text) or [""]
    parts = [first]
    if flag.choices and not _are_short(flag):
        parts.append(f"One of {', '.join(flag.choices)}.")
    if names := CHOICES.get((flag.owner, flag.name)):
        parts.append(f"Names: {', '.join(names)}.")
    return " ".join([*parts, *_default(flag, more)])


def _default(flag: Flag, more: Sequence[str]) -> list[str]:
    """Return what holds where the flag is not given, from its text or its value. Nothing is said of a flag that is off."""
    if flag.default is dataclasses.MISSING:
        return [] if flag.positional else ["(required)"]
    said = [text.removeprefix("Default: ") for text in more if text.startswith("Default: ")]
    if flag.default is not None and flag.default is not False and flag.default != "":
        said = ["yes" if flag.default is True else str(flag.default)]
        said += [text.removeprefix("auto: ") for text in more if text.startswith("auto: ")] if said == ["auto"] else []
    return [f"(default: {': '.join(said).removesuffix('.')})"] if said else []


_HYPHEN = "\ue000"  # stands for hyphens while lines are folded: a name is not folded in the middle


def _whole(text: str) -> str:
    return visible(text).replace("-", _HYPHEN)


class Page(click.Command):
    """A command of click whose help is laid out here."""

    def get_help(self, ctx: click.Context) -> str:
        """Return the help."""
        return super().get_help(ctx).replace(_HYPHEN, "-")

    def __init__(
        self, command: str, cls: type[DataclassInstance], flags: Sequence[Flag], params: list[click.Parameter]
    ) -> None:
        super().__init__(command, params=params, context_settings=SETTINGS)
        self.cls, self.flags = cls, flags

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the whole help."""
        assert self.name is not None
        formatter.write_usage("deltaw", f"{self.name} {arguments(self.flags)} [flags]")
        formatter.write_paragraph()
        formatter.write_text(_whole(" ".join((self.cls.__doc__ or "").split())))
        with formatter.section("Example"):
            formatter.write(f"  {EXAMPLES[self.name]}\n")
        for title, flags in groups(self.name, self.flags).items():
            with formatter.section(title):
                formatter.write_dl([(_left(flag), _whole(_right(flag))) for flag in flags], col_max=_LEFT)


class Contents(click.Group):
    """`deltaw` itself: its help names the commands."""

    def get_help(self, ctx: click.Context) -> str:
        """Return the help."""
        return super().get_help(ctx).replace(_HYPHEN, "-")

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the whole help."""
        formatter.write_usage("deltaw", "COMMAND …")
        formatter.write_paragraph()
        formatter.write_text(
            "ΔW: train, keep, switch, merge and exactly undo low-rank updates of pretrained models. "
            "`deltaw train MODEL DATA` begins; `deltaw COMMAND --help` has a command's flags and an example."
        )
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, _whole(_first(COMMANDS[name]))) for name in names.split()])
        with formatter.section("Also"):
            formatter.write_dl([
                ("deltaw --version", "Show the version."),
                ("shell completion", 'eval "$(_DELTAW_COMPLETE=bash_source deltaw)", or zsh_source, fish_source.'),
                ("exit codes", "0 it worked, 2 settings, 3 targets, 4 adapters, 5 files, 6 data, 7 training, 130 Ctrl-C, "
                               "143 SIGTERM (docs/errors.md)."),
            ])  # fmt: skip


def _first(cls: type) -> str:
    return sentences(" ".join((cls.__doc__ or "").split()))[0]


def arguments(flags: Sequence[Flag]) -> str:
    """Return the arguments without flags, as they stand on the command line."""
    words = [(flag.positional, flag.default is dataclasses.MISSING) for flag in flags if flag.positional]
    return " ".join(f"{word}" if required else f"[{word}]" for word, required in words)


SETTINGS = {"max_content_width": WIDEST + 2, "help_option_names": ["-h", "--help"]}  # click keeps two columns free
