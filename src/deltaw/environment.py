"""Where something ran: processor, memory, accelerator, versions. What a result is to be read with. Knows no models."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from deltaw.version import __version__

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
