"""The singular values of an adapter's ΔW's, from its factors alone. Knows files; no models.

QR of A and of B and the SVD of an R×R matrix give those of BA: no [d, k] matrix is formed, and an adapter of a 7B model takes
seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deltaw.errors import FileError
from deltaw.files.formats import peft
from deltaw.files.formats.peft import LoRAFile
from deltaw.layers.names import in_order
from deltaw.layers.ops.svd import Triples, triples


@dataclass(frozen=True)
class Spectrum:
    """Of one layer's ΔW = scale·BA. (Of DoRA: of what the magnitude then rescales.)"""

    values: tuple[float, ...]
    """Singular values, falling; as many as the rank of the file. Of a stack of matrices, the roots of their sums of squares."""
    shape: tuple[int, int]
    """d, k"""
    count: int = 1
    """Matrices of this shape: more than one in a stack (a mixture's experts), whose updates all have one rank."""

    @property
    def cost(self) -> int:
        """Parameters of one direction."""
        return self.count * sum(self.shape)

    @cached_property
    def squares(self) -> tuple[float, ...]:
        return tuple(v * v for v in self.values)

    @property
    def norm(self) -> float:
        """‖ΔW‖, Frobenius."""
        return math.sqrt(sum(self.squares))

    def energy(self, rank: int) -> float:
        """Share of ‖ΔW‖² that the first `rank` directions hold."""
        total = sum(self.squares)
        return sum(self.squares[:rank]) / total if total else 1.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank that holds this share."""
        return next((r for r in range(1, len(self.values)) if self.energy(r) >= energy * (1 - 1e-12)), len(self.values))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ/Σσ: n equal directions count n (Roy and Vetterli 2007). 0 for ΔW = 0."""
        total = sum(self.values)
        shares = [v / total for v in self.values if v > 0] if total else []
        return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0


def spectrum(path: str | Path) -> dict[str, Spectrum]:
    """Layer name → the spectrum of its ΔW, of an adapter folder. Raises FileError for one that cannot be
    read, or has no A and B."""
    return spectra_of(triples_of(peft.read(Path(path)), Path(path)))


def spectra_of(found: Mapping[str, Triples]) -> dict[str, Spectrum]:
    """Layer name → its spectrum, of what `triples_of` gives."""
    return {
        layer: Spectrum(tuple(own.squares.sqrt().tolist()), (own.U.shape[-2], own.Vh.shape[-1]), own.S[..., 0].numel())
        for layer, own in found.items()
    }


def triples_of(file: LoRAFile, folder: Path) -> dict[str, Triples]:
    """Layer name → the singular triples of scale·BA, in the order of the layers' numbers; of a stack those of each matrix. Raises
    FileError where there is no A and B."""
    if not file.factors:
        raise FileError(f"{folder} has no A and B: it trains modules whole, which have no rank.")
    found = {}
    for layer in in_order(file.factors):
        A, B = file.matrices(layer)
        found[layer] = triples(A, B.double() * file.scales[layer])
    return found
