"""How much memory this process holds, and how much more there is: of the machine, a container, a GPU. Knows no models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

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
