"""A hub id → the folder of its files. Knows no models."""

from __future__ import annotations

from pathlib import Path

from deltaw.errors import FileError

# What a model folder in safetensors has: weights, config, tokenizer
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def is_hub_id(source: str) -> bool:
    """Whether a MODEL that is no file or folder is meant as a name on the hub."""
    return not Path(source).expanduser().exists() and not source.startswith((".", "/", "~")) and source.count("/") <= 1


def snapshot(name: str) -> Path:
    """The folder of the hub's cache with these files, downloaded where they are not there. Raises FileError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:  # the hub's own errors are of these
        raise FileError(f"{name} cannot be had from the hub: {str(error).splitlines()[0]}") from error
