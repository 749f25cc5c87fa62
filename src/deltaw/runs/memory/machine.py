"""The machine: its processor, accelerator and versions, how much memory this process holds and how much more there is. Knows no
models."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from deltaw import __version__

_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")


def held() -> int:
    """Bytes of this process that are in memory; 0 where that cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return _psutil_held()


def free(device: torch.device) -> int | None:
    """Bytes that can still be had on this device, what torch keeps there for later use among them; None where it is not known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type != "cpu":
        return None
    found = [n for n in (_of_machine(), _of_container()) if n is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return _psutil_free()


def _of_container() -> int | None:
    """Where a control group sets a limit, what is left of it; what only caches files in it counts as used."""
    try:
        most, used = (Path(path).read_text().strip() for path in _CONTAINER)
        return None if most == "max" else max(0, int(most) - int(used))
    except (OSError, ValueError):
        return None


def _psutil_held() -> int:
    if sys.platform not in ("win32", "darwin"):
        return 0
    try:
        import psutil
    except ImportError:
        return 0
    return int(psutil.Process().memory_info().rss)


def _psutil_free() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


_PACKAGES = ("torch", "transformers", "peft", "trl", "safetensors", "datasets", "numpy")


def describe() -> dict[str, Any]:
    """processor, cores, threads, memory_gib, gpu (None without one), python, versions of the packages that are installed."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {"deltaw": __version__}
        | {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def in_words(found: dict[str, Any]) -> str:
    """One line of what `describe` found."""
    place = found["gpu"] or f"{found['processor']}, {found['threads']} of {found['cores']} cores"
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers"))
    return f"deltaw {found['versions']['deltaw']}, {versions}; {place}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
