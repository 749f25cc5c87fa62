"""Where a benchmark ran, and where its result goes: results/NAME.json with machine, versions and time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
_PACKAGES = ("deltaw", "torch", "transformers", "peft", "trl", "safetensors", "datasets", "numpy")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, accelerator and versions of this machine."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """Write results/NAME.json and show it."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    whole = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": describe(), **result}
    text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
    print(text)
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
