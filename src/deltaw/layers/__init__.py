"""One dense layer: how W0 reads as [d, k], how its class is patched and given back, which adapter a row goes through."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Return a kind's class, which pickles of version 0.1 and before name here."""
    if name == "Kind" or name.endswith("Kind"):
        return getattr(importlib.import_module("deltaw.layers.kinds"), name)
    raise AttributeError(f"module 'deltaw.layers' has no attribute {name!r}")
