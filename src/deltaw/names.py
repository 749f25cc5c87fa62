"""Dotted names of layers, as people read them. Knows no models."""

from __future__ import annotations

import re


def family(name: str) -> str:
    """The name with its numbers as *: layers that differ only in their place in a stack share it."""
    return re.sub(r"\b\d+\b", "*", name)
