"""The layout of a run's folder, and a run that takes the place of the one before. Knows files; no models.

A run that replaces another one lies in next/, within the other's folder. The other stays as it is until the new one is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deltaw.config import LATEST
from deltaw.errors import ConfigError, FileError
from deltaw.files.formats.atomic import exchange, write_text
from deltaw.files.formats.lock import locked
from deltaw.training.keeper import BEFORE, NEWEST

# Written into next/ once the run in it is whole and is about to be moved. It holds the checksum of its adapter, by which one sees
# whether that was moved already, also in a copy of the folder, the files of the run before that the new one lacks, and whether a
# tracker has files of it
_REPLACING = "replacing.json"


@dataclass(frozen=True)
class RunFolder:
    """The one place that knows where a run's files lie on disk."""

    path: Path

    @property
    def adapter(self) -> Path:
        """The trained adapter, in PEFT format."""
        return self.path / "adapter"

    @property
    def config(self) -> Path:
        """The settings that reproduce the run."""
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        """The run's events, a line each."""
        return self.path / "log.jsonl"

    @property
    def result(self) -> Path:
        """The figures of the run that has ended."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def tracks(self) -> Path:
        """The folder of a tracker that writes files, such as TensorBoard."""
        return self.path / "tracks"

    @property
    def score(self) -> Path:
        """The outcome of a study's candidate."""
        return self.path / "score.json"

    @property
    def states(self) -> tuple[Path, Path]:
        """The state that a run is resumed from, and the one before it."""
        return self.path / NEWEST, self.path / BEFORE

    def forget_states(self) -> None:
        """Remove what the run could be resumed from."""
        for path in self.states:
            path.unlink(missing_ok=True)

    @property
    def lock(self) -> Path:
        """The file that the process that writes here holds."""
        return self.path / ".lock"

    @property
    def next(self) -> RunFolder:
        """The run that will take this one's place."""
        return RunFolder(self.path / "next")

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of a run but its adapter, those that say that it is whole last."""
        return (self.config, self.log, *self.states, self.report, self.score, self.result)

    @property
    def holds_a_run(self) -> bool:
        """True where anything of a run is here, its adapter alone included."""
        return self.adapter.exists() or any(path.exists() for path in self.files)

    @property
    def is_whole(self) -> bool:
        """True where a run has come to its end here."""
        return self.result.exists() and self.adapter.exists()

    @property
    def latest(self) -> RunFolder:
        """The run that was begun last: the one that will take this one's place, where there is one."""
        return self.next if self.next.config.exists() else self


@contextlib.contextmanager
def at_work(folder: RunFolder) -> Iterator[tuple[str, ...]]:
    """Be the one process that writes into a run's folder, while open. Yields what is to be told of one that died at it.

    A folder that is new goes again if nothing came into it. Raises FolderInUse where another process is at work there.
    """
    refuse_a_file(folder.path)
    new = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder.path} cannot be made ({error.strerror}): nothing was begun.") from error
    try:
        with locked(folder.lock, "works in it") as note:
            yield (note,) if note else ()
    finally:
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def dated(out: str) -> str:
    """Return the folder of a new run: `out`, or for the default one beside it, with today's date and the next number."""
    if out != LATEST:
        return out
    beside, day = Path(out).parent, time.strftime("%Y-%m-%d")
    return str(next(path for n in itertools.count(1) if not (path := beside / f"{day}-{n}").exists()))


def name_latest(folder: RunFolder) -> str:
    """Let the default folder be a link to this run. Returns a sentence to tell where it cannot be; "" else."""
    link = Path(LATEST)
    if link.exists() and not link.is_symlink():
        return f"{link} holds a run of before, and stays as it is. This run is in {folder.path}."
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.path.name, target_is_directory=True)
        temporary.replace(link)
    except (OSError, NotImplementedError) as error:  # on Windows, links are for administrators
        return f"{link} could not be made a link to this run, which is in {folder.path}: {error}"
    return ""


def refuse_a_file(folder: Path) -> None:
    """Raise ConfigError where a file, or a link to nothing, is in the place of a folder that is to be written."""
    if os.path.lexists(folder) and not folder.is_dir():
        kind = "a file" if folder.exists() else "a link that leads nowhere"
        raise ConfigError(f"out is {folder}, which is {kind}; name a folder.")


def check_free(folder: RunFolder, *, overwrite: bool) -> None:
    """Raise ConfigError where the folder holds something and nothing says to overwrite it."""
    finish_replacing(folder)
    if any(path != folder.lock for path in folder.path.iterdir()) and not overwrite:
        raise ConfigError(_what_is_there(folder))


def begin(folder: RunFolder) -> RunFolder:
    """Return where a new run into `folder` lies: there, or in next/ beside the run that it is to replace."""
    clear(folder.next)
    return folder.next if folder.holds_a_run else folder


def copy_log(source: RunFolder, target: RunFolder) -> None:
    """Copy a run's log into the folder in which the run goes on."""
    target.path.mkdir(parents=True, exist_ok=True)
    if source.log.exists():
        shutil.copyfile(source.log, target.log)


def _what_is_there(folder: RunFolder) -> str:
    latest = folder.latest
    if latest.config.exists() and not latest.is_whole:
        return (
            f"The run folder {folder.path} holds a run that has not come to its end. Go on with it:\n"
            f"  deltaw train --resume {shlex.quote(str(folder.path))}\n"
            "or choose another --out, or pass --overwrite to begin anew."
        )
    return f"The run folder {folder.path} is not empty. Choose another --out, or pass --overwrite to replace it."


def clear(folder: RunFolder) -> None:
    """Remove what a run wrote into a folder, and the folder if nothing else is in it."""
    if not folder.path.is_dir():
        return
    for path in (*reversed(folder.files), *folder.path.glob(".*.tmp")):
        path.unlink(missing_ok=True)
    # With what take_place moves aside
    for inner in (folder.adapter, folder.adapter.with_suffix(".old"), folder.tracks):
        shutil.rmtree(inner, ignore_errors=True)
    if not any(folder.path.iterdir()):
        folder.path.rmdir()


def put_in_place(folder: RunFolder) -> RunFolder:
    """Put the run in next/, which is whole, in the place of the one that is there. Return `folder`."""
    new = folder.next
    stale = [there.name for here, there in zip(new.files, folder.files, strict=True) if not here.exists()]
    mark = {"adapter": _content(new.adapter), "stale": stale, "tracks": new.tracks.exists()}
    write_text(new.path / _REPLACING, json.dumps(mark))
    finish_replacing(folder)
    return folder


def finish_replacing(folder: RunFolder) -> None:
    """Finish what a process was doing that died while it put a new run in the place of the one before."""
    new, mark = folder.next, folder.next.path / _REPLACING
    if not mark.exists():
        if not new.config.exists():
            clear(new)  # it died while it removed what it had moved
        return
    replacing = json.loads(mark.read_text(encoding="utf-8"))
    if not folder.adapter.exists() or _content(folder.adapter) != replacing["adapter"]:
        exchange.take_place(new.adapter, folder.adapter)
    if new.tracks.exists() or not replacing.get("tracks"):
        shutil.rmtree(folder.tracks, ignore_errors=True)
    if new.tracks.exists():
        new.tracks.rename(folder.tracks)
    for here, there in zip(new.files, folder.files, strict=True):
        if here.exists():
            here.replace(there)
        elif there.name in replacing["stale"]:
            there.unlink(missing_ok=True)
    mark.unlink()
    clear(new)


def _content(folder: Path) -> str:
    """Return the sha256, in hex, over the names and the bytes of a folder's files."""
    hashed = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hashed.update(f"{path.relative_to(folder)!r} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                hashed.update(piece)
    return hashed.hexdigest()
