"""The place and the origin of a converted adapter: what may be replaced there, and the key for where it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deltaw.errors import ConfigError, FileError

ORIGIN = "deltaw_converted_from"
"""Key of a converted adapter's metadata: the format that it came from."""


def check_is_adapter(dst: Path, read: Callable[[], object]) -> None:
    """Raise ConfigError where a file would be replaced that is no adapter: a model's weights have the same endings."""
    if not dst.is_file():
        return
    try:
        read()
    except FileError as error:
        raise ConfigError(
            f"{dst} is not replaced, since it holds no adapter. Choose another place. ({error})"
        ) from error
