"""The machine: its processor, accelerator and package versions; the memory of this process, and what is left. Knows no models."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TypedDict

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
    }


def in_words(environment: Environment) -> str:
    """Return one line: versions, and the GPU or else the processor."""
    cores = f"{environment['processor']}, {environment['threads']} of {environment['cores']} cores"
    versions = environment["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return f"deltaw {versions['deltaw']}, {libraries}; {environment['gpu'] or cores}"


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
