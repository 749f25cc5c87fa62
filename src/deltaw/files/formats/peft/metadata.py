"""Deltaw's additions to the header of an adapter's file: its base, its slices, its end tokens and more. No model code."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from deltaw.errors import BaseMismatch, FileError
from deltaw.files.formats.fingerprint import Fingerprint, Outdated
from deltaw.files.formats.peft.config import WEIGHTS
from deltaw.layers.kinds import Runs

log = logging.getLogger("deltaw")

FORMAT = "1"
FORMAT_KEY, VERSION_KEY = "deltaw_format", "deltaw_version"
# Fingerprints of the whole base, and of the weights of the adapter's layers
BASE, W0 = "deltaw_base", "deltaw_w0"
# JSON list of the layers whose weights are stored [k, d]
TRANSPOSED = "deltaw_transposed"
# JSON, layer → its slices that have updates of their own → their rows of its output
SLICES = "deltaw_slices"
# JSON list of the tokens that end what the adapter was taught to say
ENDS = "deltaw_ends"
# JSON, layer → its scale, where no α in the settings gives that to the last bit
SCALES = "deltaw_scales"

_NO_BASE = "%s has no fingerprint of its base (it was not written by deltaw): only its keys and shapes are checked."
_OUTDATED = (
    "%s names its base as an older version of deltaw did, by a sample of its entries, which tells too few bases apart: only its "
    "keys and shapes are checked. Save the adapter again to renew it."
)

Metadata = Mapping[str, str]
"""Key of the safetensors header → text. Empty of files that others wrote without."""


def is_ours(metadata: Metadata) -> bool:
    """Return whether deltaw wrote a file with this metadata."""
    return any(key.startswith("deltaw_") for key in metadata)


def check_base(
    metadata: Metadata, folder: Path, key: str, hash_of: Callable[[str], str | None], base: str | None
) -> str:
    """Compare the fingerprint under `key` (BASE or W0) with weights.

    Args:
        metadata: of the adapter's file.
        folder: the adapter's.
        key: which fingerprint.
        hash_of: form of a hash → that hash of the weights; None where they cannot be read.
        base: the name of the base that the adapter was trained on, for messages.

    Returns:
        "same"; "cast" for the same weights in another precision; "unknown", which is logged, without a fingerprint or weights.

    Raises:
        BaseMismatch: for other weights.
        FileError: for a damaged fingerprint.
    """
    expected = fingerprint_of(metadata, folder, key)
    if expected is None:
        log.warning(_OUTDATED if key in metadata else _NO_BASE, folder)
        return "unknown"
    verdict = expected.compare_by(hash_of)
    if verdict == "unknown":
        log.warning("Some weights of the base are not in memory: whether %s belongs to it is not checked.", folder)
    if verdict == "different":
        raise BaseMismatch(
            f"The adapter in {folder} was trained on other base weights ({base or 'another model'}) than these are.\n"
            f"Give that base, or pass check_base=False (command line: --any-base) if you know that it fits."
        )
    if verdict == "cast":
        log.debug("%s was trained on this base in another precision.", folder)
    return verdict


def fingerprint_of(metadata: Metadata, folder: Path, key: str) -> Fingerprint | None:
    """Return the fingerprint under `key`; None without one, and for one of the first version.

    Raises:
        FileError: for a damaged one.
    """
    text = metadata.get(key)
    try:
        return None if text is None else Fingerprint.parse(text)
    except Outdated:
        return None
    except ValueError as error:
        raise FileError(f"{folder}: the base fingerprint {text!r} in its metadata is damaged.") from error


def ends_of(metadata: Metadata, folder: Path) -> tuple[int, ...]:
    """Return the ids of the tokens that end what the adapter was taught to say; none in foreign files.

    Raises:
        FileError: for a damaged list.
    """
    try:
        ends = json.loads(metadata.get(ENDS, "[]"))
        if not isinstance(ends, list) or not all(type(end) is int and end >= 0 for end in ends):
            raise ValueError(f"{ends!r} is no list of token ids")
    except ValueError as error:
        raise FileError(f"{folder}: the end tokens in the metadata of {WEIGHTS} are damaged: {error}") from error
    return tuple(ends)


def transposed_layers(metadata: Metadata) -> set[str] | None:
    """Return the layers whose weights are stored [k, d]; None in foreign files. Raises FileError for a damaged list."""
    if not is_ours(metadata):
        return None
    try:
        return set(json.loads(metadata.get(TRANSPOSED, "[]")))
    except (ValueError, TypeError) as error:
        raise FileError(f"The list of transposed layers in the metadata of {WEIGHTS} is damaged: {error}") from error


def slices_of(metadata: Metadata) -> dict[str, dict[str, Runs]]:
    """Return layer → slice → its rows, of the layers whose A and B are those of some slices.

    Raises:
        FileError: for damaged slices.
    """
    try:
        slices = {
            layer: {name: tuple((int(a), int(b)) for a, b in runs) for name, runs in of_layer.items()}
            for layer, of_layer in json.loads(metadata.get(SLICES, "{}")).items()
        }
        for of_layer in slices.values():
            if not of_layer or any(not 0 <= a < b for runs in of_layer.values() for a, b in runs or ((0, 0),)):
                raise ValueError(f"{of_layer} are no rows")
        return slices
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(f"The slices of layers in the metadata of {WEIGHTS} are damaged: {error}") from error


def scales_of(metadata: Metadata) -> dict[str, float]:
    """Return layer → scale, of those that no α gives to the last bit. Raises FileError for damaged ones."""
    try:
        return {layer: float(scale) for layer, scale in json.loads(metadata.get(SCALES, "{}")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(f"The scales of layers in the metadata of {WEIGHTS} are damaged: {error}") from error
