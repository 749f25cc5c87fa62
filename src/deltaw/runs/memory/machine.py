"""The machine: its processor, accelerator and package versions; the memory of this process, and what is left. Knows no models."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import psutil
import torch

from deltaw import __version__

_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def held() -> int:
    """Return the bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def free(device: torch.device) -> int | None:
    """Return the bytes still to be had on this device, torch's unused cache included; None where that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return None
    of_machine, of_group = int(psutil.virtual_memory().available), left_in_group()
    return of_machine if of_group is None else min(of_machine, of_group)


def left_in_group(limit: Path = _LIMIT, used: Path = _USED) -> int | None:
    """Return what is left of a control group's limit, its cached files counted as used; None without a limit.

    psutil knows the machine alone, and a process beyond its container's limit is killed however much the machine has left.
    """
    try:
        most, now = limit.read_text().strip(), used.read_text().strip()
        return None if most == "max" else max(0, int(most) - int(now))
    except (OSError, ValueError):
        return None


_PACKAGES = ("torch", "transformers", "peft", "trl", "safetensors", "datasets", "numpy")


class Environment(TypedDict):
    """The machine as results files have it."""

    processor: str
    cores: int | None
    threads: int
    """torch's."""
    memory_gib: float
    """Memory of the machine, whatever a container leaves of it."""
    gpu: str | None
    python: str
    versions: dict[str, str]
    """deltaw's, and those of the packages that are installed."""
    date: NotRequired[str]
    """The time of description, to the minute, in UTC."""
    command: NotRequired[str | None]
    """The command that this process runs, without the machine's folders; None in Python."""


def describe() -> Environment:
    """Return the machine that this process runs on."""
    versions = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {"deltaw": __version__, **versions},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": command(sys.argv),
    }


def in_words(environment: Environment) -> str:
    """Return one line: versions, and the GPU or else the processor."""
    cores = f"{environment['processor']}, {environment['threads']} of {environment['cores']} cores"
    versions = environment["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return f"deltaw {versions['deltaw']}, {libraries}; {environment['gpu'] or cores}"


def foot(environment: Environment) -> str:
    """Return the lines at the foot of a report: date and versions, the machine, and the command."""
    versions, gpu = environment["versions"], environment["gpu"]
    libraries = [f"{name} {versions[name]}" for name in ("deltaw", "torch", "transformers") if name in versions]
    machine = [
        environment["processor"],
        f"{environment['threads']} of {environment['cores']} cores",
        f"{environment['memory_gib']:g} GiB of memory",
        gpu or "no GPU",
    ]
    first = [*filter(None, [environment.get("date")]), *libraries, f"Python {environment['python']}"]
    return "\n".join([" · ".join(first), " · ".join(machine), *filter(None, [environment.get("command")])])


def command(arguments: Sequence[str]) -> str | None:
    """Return the `deltaw` command of a process's arguments, as it may be shown; None where they are no such command.

    >>> command(["/usr/bin/deltaw", "train", "/data/models/llama", "my data.jsonl", "--out=/tmp/run"])
    "deltaw train …/llama 'my data.jsonl' --out=…/run"
    """
    program = Path(arguments[0])
    if program.stem != "deltaw" and (program.parent.name, program.name) != ("deltaw", "__main__.py"):
        return None
    return " ".join(
        ["deltaw", *(shlex.quote(word) if word == shown else shown for word, shown in _shown(arguments[1:]))]
    )


def _shown(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each word, and the same with `placeless` paths."""
    for word in words:
        flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        yield word, f"{flag}{equals}{placeless(value)}"


def placeless(name: str) -> str:
    """Return a path without the folders that only this machine has: from the working folder on, else its last name.

    >>> placeless("/data/models/llama"), placeless("org/model")
    ('…/llama', 'org/model')
    """
    path = Path(name)
    if not path.is_absolute():
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else f"…/{path.name}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name. On Linux Python has its architecture alone, and the name is in /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
