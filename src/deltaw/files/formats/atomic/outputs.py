"""Outputs that would destroy something: an input, or a folder that deltaw did not write. Refused before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from deltaw.errors import ConfigError, shown

SIGNED = ".deltaw"
"""In a folder whose files do not tell that deltaw wrote it: their names, a line each."""


def check_apart(out: str | Path, inputs: Mapping[str, object]) -> None:
    """Raise ConfigError where an output is, holds, or lies in something that is read to make it.

    Links are followed, also those in an input's folder (the hub's cache).

    Args:
        out: the file or folder to write.
        inputs: what it is, such as "the base" → its path. Values that are no paths, and paths where nothing is (hub ids, names of
            splits), are passed over.
    """
    place = _real(Path(out))
    problems = []
    for what, value in inputs.items():
        if not isinstance(value, str | os.PathLike) or not str(value):
            continue
        path = Path(value).expanduser()
        if not os.path.lexists(path):
            continue
        if any(how := _relation(place, _real(part)) for part in (path, *_linked(path))):
            problems.append(f"it {how} {what}, {value}")
    if problems:
        raise ConfigError(
            f"{out} cannot be written; nothing was touched:", problems, "Choose another place to write to."
        )


def _relation(place: Path, path: Path) -> str:
    """Say how an output lies to an input, both without links; "" where they are apart."""
    if _same(place, path):
        return "is"
    if any(_same(place, parent) for parent in path.parents):
        return "holds"
    return "lies in" if any(_same(parent, path) for parent in place.parents) else ""


def _same(one: Path, other: Path) -> bool:
    """Return whether two paths name one file or folder, also by names that differ in case alone, or through a mount."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


def _linked(path: Path) -> Iterable[Path]:
    """Return the links in a folder."""
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return [Path(entry.path) for entry in entries if entry.is_symlink()]


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path.expanduser()))


def check_replaceable(out: str | Path, kind: str, others: Callable[[Path], Iterable[str] | None]) -> None:
    """Raise ConfigError where a folder would be replaced that deltaw did not write. An empty one may be.

    Args:
        out: the folder to write.
        kind: what may be replaced there, for the message: "an adapter".
        others: returns the names in a folder that are not of this kind; None where the folder is none of this kind.
    """
    out = Path(out)
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; name a folder.")
    names = sorted(path.name for path in out.iterdir())
    foreign = others(out) if names else []
    if foreign is None:
        raise ConfigError(
            f"{out} is not replaced, since it is not {kind}. In it: {shown(names, 8)}. Choose another place, or remove "
            "the folder yourself."
        )
    if lost := sorted(foreign):
        raise ConfigError(
            f"{out} is not replaced, since more than {kind} is in it, which would be lost: {shown(lost, 8)}. Choose another "
            "place, or move that away."
        )


def sign(folder: Path) -> None:
    """Note in a folder which files are in it: `files_written` tells by this that deltaw wrote it."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SIGNED)
    (folder / SIGNED).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def files_written(folder: Path) -> set[str] | None:
    """Return the names that deltaw wrote into a folder; None for one that is not signed."""
    try:
        return {SIGNED, *(folder / SIGNED).read_text(encoding="utf-8").splitlines()}
    except (OSError, UnicodeDecodeError):
        return None
