"""One checksum over named tensors and texts, by which damage to a file is found. Knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from deltaw.layers.ops.checksums import octets


def checksum(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """Return the sha256, in hex, over the texts and over each tensor's name, dtype, shape and bytes.

    Tensors count in the order of their names. They are on the CPU.
    """
    hashed = hashlib.sha256()
    for text in texts:
        _add(hashed, text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        _add(hashed, f"{name}\0{tensor.dtype}\0{list(tensor.shape)}".encode())
        hashed.update(octets(tensor.detach().contiguous().reshape(-1)))
    return hashed.hexdigest()


def _add(hashed: hashlib._Hash, part: bytes) -> None:
    """Add bytes with their length in front, so that no two lists of parts are alike."""
    hashed.update(len(part).to_bytes(8, "little") + part)
