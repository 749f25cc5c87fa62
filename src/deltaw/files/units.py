"""Amounts of bytes and time as people read and write them. Knows nothing else."""

from __future__ import annotations

import re

from deltaw.errors import ConfigError

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMGT]I?)?)B?\s*")


def size(count: float) -> str:
    """Return a number of bytes as a text such as 4.9 MB, in powers of ten, as disks are sold and papers count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Return a time as a text such as 1 h 02 min, 3 min 07 s or 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def parse_size(text: str, what: str) -> int:
    """Return the bytes of a text such as "16GB", "16 GiB" or "512M".

    Raises ConfigError, with `what` as the name of the setting.
    """
    match = _SIZE.fullmatch(text.upper())
    if match is None or not float(match[1]):
        raise ConfigError(f"{what} is {text!r}; write an amount such as 16GB, 40GiB or 900MB.")
    return int(float(match[1]) * _UNITS[match[2]])
