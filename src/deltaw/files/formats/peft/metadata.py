"""Deltaw's additions to the header of an adapter's file: its base, its slices, its end tokens and more. No model code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from deltaw.errors import BaseMismatch, FileError
from deltaw.files.formats.checksum import checksum
from deltaw.files.formats.fingerprint import Fingerprint, Outdated
from deltaw.files.formats.peft.config import WEIGHTS
from deltaw.files.formats.strict_json import is_natural, parse, parse_object, parse_texts
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
# JSON, how the adapter was trained
TRAINING = "deltaw_training"
# JSON, layer → its scale, where no α in the settings gives that to the last bit
SCALES = "deltaw_scales"
# Path of the base on the machine that wrote the adapter, where it has no id on the hub; `push` leaves it out
BASE_PLACE = "deltaw_base_place"
# JSON, why PEFT does not load the adapter → the layers to blame
REFUSED = "deltaw_refused_by_peft"
# Checksum of the tensors and of all other texts under keys of ours
CHECKSUM = "deltaw_sha256"
_PREFIX = "deltaw_"
# Stands before the digits, by which a checksum is known under a damaged key
_SHA256 = "sha256:"

_NO_BASE = "%s has no fingerprint of its base, %s (it was not written by deltaw): only its keys and shapes are checked."
_OUTDATED = (
    "%s names its base as an older version of deltaw did, by a sample of its entries, which tells too few bases apart: only its "
    "keys and shapes are checked. Save the adapter again to renew it."
)

Metadata = Mapping[str, str]
"""Key of the safetensors header → text. Empty of files that others wrote without."""


def is_ours(metadata: Metadata) -> bool:
    """Return whether deltaw wrote a file with this metadata.

    A checksum alone does not say it: a foreign adapter that was compressed keeps its own meaning.
    """
    return any(key.startswith(_PREFIX) and key != CHECKSUM for key in metadata)


def sealed(tensors: Mapping[str, Tensor], metadata: Metadata) -> dict[str, str]:
    """Return the metadata with the checksum of these tensors, which are on the CPU, and of the texts that deltaw added."""
    return {**metadata, CHECKSUM: _checksum(tensors, metadata)}


def check_whole(tensors: Mapping[str, Tensor], metadata: Metadata, path: Path) -> None:
    """Raise FileError where the file `path` has a checksum and it is not that of what was read. Others wrote none."""
    known = metadata.get(CHECKSUM)
    if known is None and not any(text.startswith(_SHA256) for text in metadata.values()):
        return
    if known != _checksum(tensors, metadata):
        raise FileError(
            f"{path} is damaged: its checksum is not that of its tensors and metadata, so some bytes have changed since it was "
            "written. Use another copy of it. (To change an adapter's tensors, load it, change them, and save it.)"
        )


def _checksum(tensors: Mapping[str, Tensor], metadata: Metadata) -> str:
    texts = (f"{key}\0{metadata[key]}" for key in sorted(metadata) if key.startswith(_PREFIX) and key != CHECKSUM)
    return _SHA256 + checksum(tensors, *texts)


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
        if key in metadata:
            log.warning(_OUTDATED, folder)
        else:
            log.warning(_NO_BASE, folder, base or "which it does not name")
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
        ends = parse(metadata.get(ENDS, "[]"))
        if not isinstance(ends, list) or not all(map(is_natural, ends)):
            raise ValueError(f"{ends!r:.200} is no list of token ids")
    except ValueError as error:
        raise FileError(f"{folder}: the end tokens in the metadata of {WEIGHTS} are damaged: {error}") from error
    return tuple(ends)


def transposed_layers(metadata: Metadata) -> set[str] | None:
    """Return the layers whose weights are stored [k, d]; None in foreign files. Raises FileError for a damaged list."""
    if not is_ours(metadata):
        return None
    try:
        return set(parse_texts(metadata.get(TRANSPOSED, "[]")))
    except ValueError as error:
        raise FileError(f"The list of transposed layers in the metadata of {WEIGHTS} is damaged: {error}") from error


def base_in(metadata: Metadata, named: str | None) -> str | None:
    """Return where an adapter's base is to be read: the folder where it lay, or the name in the settings.

    None where that is a folder's own name alone, and the folder is not there.
    """
    place = metadata.get(BASE_PLACE)
    if place is not None and Path(place).is_dir():
        return place
    return None if named is None or (named.startswith("./") and not Path(named).is_dir()) else named


def slices_of(metadata: Metadata) -> dict[str, dict[str, Runs]]:
    """Return layer → slice → its rows, of the layers whose A and B are those of some slices.

    Raises:
        FileError: for damaged slices.
    """
    try:
        slices = {
            layer: {name: tuple((a, b) for a, b in runs) for name, runs in of_layer.items()}  # type: ignore[attr-defined]
            for layer, of_layer in parse_object(metadata.get(SLICES, "{}")).items()
        }
        for of_layer in slices.values():
            ends = [(a, b) for runs in of_layer.values() for a, b in runs or ((0, 0),)]
            if not of_layer or not all(is_natural(a) and is_natural(b) and a < b for a, b in ends):
                raise ValueError(f"{of_layer!r:.200} are no rows")
        return slices
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(f"The slices of layers in the metadata of {WEIGHTS} are damaged: {error}") from error


def _finite(scale: object) -> float:
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not abs(scale) <= sys.float_info.max:
        raise ValueError(f"{scale!r:.200} is no scale")
    return float(scale)


def scales_of(metadata: Metadata) -> dict[str, float]:
    """Return layer → scale, of those that no α gives to the last bit. Raises FileError for damaged ones."""
    try:
        return {layer: _finite(scale) for layer, scale in parse_object(metadata.get(SCALES, "{}")).items()}
    except ValueError as error:
        raise FileError(f"The scales of layers in the metadata of {WEIGHTS} are damaged: {error}") from error
