"""Adapters by their singular values: the spectrum of each ΔW, and files cut to fewer directions. Knows files; no models.

QR of A and of B and the SVD of an R×R matrix give the singular triples of BA. No [d, k] matrix is formed, so that an adapter of a
7B model takes seconds. The first r triples are the nearest matrix of rank r (Eckart and Young 1936).
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from deltaw.errors import ConfigError, FileError
from deltaw.files.formats import peft
from deltaw.files.formats.atomic import check_apart
from deltaw.files.formats.model_folder import copy_files
from deltaw.files.formats.peft import CONFIG, PICKLED, WEIGHTS, LoRAFile, check_adapter_place, config_for
from deltaw.files.formats.peft.keys import in_file
from deltaw.files.formats.peft.metadata import SLICES, slices_of
from deltaw.files.units import parse_size
from deltaw.layers.names import in_order
from deltaw.layers.ops.svd import Triples, triples

_Value = TypeVar("_Value")
# Product of the largest entries of A and scale·B from which on squares of singular values may overflow
_LARGEST = 1e140
# The settings that a cut changes
_CONFIGURED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")


# --- spectra ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one layer's ΔW = scale·BA. (With DoRA, of what the magnitude then rescales.)

    >>> from deltaw import Spectrum
    >>> s = Spectrum(values=(4.0, 3.0, 0.0), shape=(64, 32))
    >>> s.norm, s.energy(1), s.rank_for(0.9), round(s.effective_rank, 2)
    (5.0, 0.64, 2, 1.98)
    """

    values: tuple[float, ...]
    """Singular values, falling, as many as the file's rank. Of a stack of matrices, the roots of the sums of their squares."""
    shape: tuple[int, int]
    """(d, k): the layer's outputs and inputs."""
    count: int = 1
    """Matrices of this shape, more than one in a stack (a mixture's experts), whose updates all have one rank."""

    @property
    def cost(self) -> int:
        """Parameters of one direction."""
        return self.count * sum(self.shape)

    @cached_property
    def squares(self) -> tuple[float, ...]:
        """Each direction's part in ‖ΔW‖²."""
        return tuple(v * v for v in self.values)

    @property
    def norm(self) -> float:
        """‖ΔW‖, Frobenius."""
        return math.sqrt(sum(self.squares))

    def energy(self, rank: int) -> float:
        """Return the share of ‖ΔW‖² that the first `rank` directions hold."""
        total = sum(self.squares)
        return sum(self.squares[:rank]) / total if total else 1.0

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that holds this share of ‖ΔW‖²."""
        return next((r for r in range(1, len(self.values)) if self.energy(r) >= energy * (1 - 1e-12)), len(self.values))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ/Σσ: n equal directions count n (Roy and Vetterli 2007). 0 for ΔW = 0."""
        total = sum(self.values)
        shares = [v / total for v in self.values if v > 0] if total else []
        return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0


def spectrum(path: str | Path) -> dict[str, Spectrum]:
    """Compute the singular values of each layer's ΔW.

    Args:
        path: the folder of a LoRA or DoRA adapter.

    Returns:
        Layer name → its spectrum, in the order of the layers.

    Raises:
        FileError: for a folder that cannot be read, or has no A and B.

    >>> from transformers import AutoModelForCausalLM
    >>> import deltaw
    >>> model = AutoModelForCausalLM.from_pretrained("model")
    >>> folder = deltaw.save(deltaw.attach(model, deltaw.LoRA(rank=4, init="pissa", targets="q")), "spectrum")
    >>> [round(s.norm, 3) for s in deltaw.spectrum(folder).values()]  # ΔW = 0 before training
    [0.0, 0.0]
    """
    return spectra_of(triples_of(peft.read(Path(path)), Path(path)))


def spectra_of(directions: Mapping[str, Triples]) -> dict[str, Spectrum]:
    """Return layer name → its spectrum, of what `triples_of` gives."""
    return {
        layer: Spectrum(tuple(t.squares.sqrt().tolist()), (t.U.shape[-2], t.Vh.shape[-1]), t.S[..., 0].numel())
        for layer, t in directions.items()
    }


def triples_of(file: LoRAFile, folder: Path) -> dict[str, Triples]:
    """Return layer name → the singular triples of scale·BA, in the order of the layers' numbers; of a stack each matrix's.

    Raises:
        FileError: where there is no A and B.
    """
    if not file.factors:
        raise FileError(f"{folder} has no A and B: it trains modules whole, which have no rank.")
    directions = {}
    for layer in in_order(file.factors):
        A, B = file.matrices(layer)
        B = B.double() * file.scales[layer]
        # What is below this has a finite product with A, and finite squares
        if not B.abs().max() * A.double().abs().max() < _LARGEST:
            raise FileError(
                f"{folder}: ΔW of {layer} is too large for its singular values (the scale is {file.scales[layer]:g})."
            )
        directions[layer] = triples(A, B)
    return directions


# --- cuts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compressed:
    """The result of `compress`.

    >>> from pathlib import Path
    >>> from deltaw import Compressed
    >>> done = Compressed(Path("small"), {"q": 2}, {"q": 0.1}, error=0.1, bytes_before=4000, bytes=2200)
    >>> f"{1 - done.bytes / done.bytes_before:.0%} less, {done.error:.0%} of ΔW lost"
    '45% less, 10% of ΔW lost'
    """

    path: Path
    """Folder of the adapter that was written."""
    ranks: dict[str, int]
    """Layer name → rank."""
    errors: dict[str, float]
    """Layer name → ‖ΔW − ΔW'‖ / ‖ΔW‖, Frobenius norms: from 0, nothing lost, to 1."""
    error: float
    """The same of all layers together."""
    bytes_before: int
    """Bytes of the adapter's files before."""
    bytes: int
    """Bytes of the files that were written."""


def compress(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size: int | str | None = None,
) -> Compressed:
    """Write an adapter with fewer directions of ΔW, atomically; it stays an ordinary adapter.

    No layer has less than rank 1. What a file has besides A and B stays. Give exactly one of `rank`, `energy` and `size`.

    Args:
        adapter: the folder of a LoRA or DoRA adapter.
        out: the folder to write.
        rank: the most directions that any layer keeps.
        energy: the share of each layer's ‖ΔW‖² to keep, above 0 and at most 1.
        size: the most bytes that the folder may take, such as "1MB", spent where a byte keeps the most of ‖ΔW‖².

    Raises:
        ConfigError: for settings out of range, or not exactly one of them; for an `out` that is, holds or lies in the adapter, or
            holds something else than an adapter.
        FileError: for an adapter that cannot be read, cannot be so small, or cannot be written. `out` is then as it was.

    >>> from transformers import AutoModelForCausalLM
    >>> import deltaw
    >>> model = AutoModelForCausalLM.from_pretrained("model")
    >>> folder = deltaw.save(deltaw.attach(model, deltaw.LoRA(rank=8, targets="q")), "large")
    >>> set(deltaw.compress(folder, "small", rank=2).ranks.values())
    {2}
    """
    folder, out = Path(adapter), Path(out)
    chosen = [name for name, value in (("rank", rank), ("energy", energy), ("size", size)) if value is not None]
    if len(chosen) != 1:
        raise ConfigError(
            "Give one of rank, energy and size (command line: --rank, --energy, --bytes); "
            f"there is {' and '.join(chosen) or 'none'}."
        )
    check_apart(out, {"the adapter": folder})
    check_adapter_place(out)
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; it must be at least 1.")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ConfigError(f"energy is {energy}; it must be above 0 and at most 1.")
    file = peft.read(folder)
    directions = triples_of(file, folder)
    spectra = spectra_of(directions)
    if size is not None:
        limit = parse_size(size, "size") if isinstance(size, str) else size
        ranks = _within(file, directions, spectra, limit, folder)
    else:
        ranks = {
            layer: min(rank, len(s.values)) if rank is not None else s.rank_for(energy or 1.0)
            for layer, s in spectra.items()
        }
        ranks = _told_apart(ranks, file)
    peft.write(out, truncated(file, directions, ranks), lambda written: copy_files(folder, written))
    errors = {layer: math.sqrt(max(0.0, 1.0 - s.energy(ranks[layer]))) for layer, s in spectra.items()}
    total = sum(s.norm**2 for s in spectra.values())
    missing = sum((errors[layer] * s.norm) ** 2 for layer, s in spectra.items())
    return Compressed(
        out, _shown(ranks, file), _shown(errors, file), math.sqrt(missing / total) if total else 0.0, folder_bytes(folder),
        folder_bytes(out),
    )  # fmt: skip


def _shown(values: Mapping[str, _Value], file: LoRAFile) -> dict[str, _Value]:
    """Return values of layers by their names for people."""
    return {file.shown(layer): value for layer, value in values.items()}


def truncated(file: LoRAFile, directions: Mapping[str, Triples], ranks: Mapping[str, int]) -> LoRAFile:
    """Return the file with the first so many directions of each layer's ΔW.

    A layer that keeps all it has is as it was. Of the others the scale is in A and B, which have equal norms.

    Args:
        file: the adapter.
        directions: layer name → the triples of its ΔW.
        ranks: layer name → how many to keep.
    """
    factors, scales, biases = dict(file.factors), dict(file.scales), dict(file.biases)
    before = {layer: file.rank(layer) for layer in factors}
    cut = [layer for layer, rank in before.items() if ranks[layer] < rank]
    if not cut:
        return file
    for layer in cut:
        dtype = file.factors[layer][0].dtype
        A, B, _ = directions[layer].cut(rank=ranks[layer])
        factors[layer] = in_file(A.to(dtype), B.to(dtype))
        scales[layer] = 1.0
        if layer in biases:
            biases[layer] = biases[layer] * file.scales[layer]
    kept = {layer: min(rank, ranks[layer]) for layer, rank in before.items()}
    config = config_for(
        _by_names(kept, file), _by_names(scales, file), target_modules=[],
        target_parameters=file.config.settings.get("target_parameters"),
    )  # fmt: skip
    metadata = dict(file.metadata)
    if SLICES in metadata:  # their A's and B's are no longer apart
        slices = {layer: runs for layer, runs in slices_of(metadata).items() if layer not in cut}
        del metadata[SLICES]
        metadata |= {SLICES: json.dumps(slices)} if slices else {}
    return dataclasses.replace(
        file, factors=factors, scales=scales, biases=biases, metadata=metadata,
        config=file.config.changed(**{key: config.settings[key] for key in _CONFIGURED}),
    )  # fmt: skip


def _by_names(values: Mapping[str, _Value], file: LoRAFile) -> dict[str, _Value]:
    """Return values of layers by their names in the file, and by those that PEFT's patterns know them by."""
    return {name: x for layer, x in values.items() for name in file.names_in_peft(layer)} | dict(values)


def _told_apart(ranks: Mapping[str, int], file: LoRAFile) -> dict[str, int]:
    """Return the same or larger ranks, as PEFT can read them: layers that it knows by the same names have one."""
    names = {layer: tuple(file.names_in_peft(layer)) for layer in ranks}
    most: dict[tuple[str, ...], int] = {}
    for layer, rank in ranks.items():
        most[names[layer]] = max(rank, most.get(names[layer], 1))
    return {layer: most[names[layer]] for layer in ranks}


def allocated(spectra: Mapping[str, Spectrum], parameters: int) -> dict[str, int]:
    """Return layer name → rank, at least 1, within so many parameters altogether.

    One direction after the other is taken where a parameter keeps the most of ‖ΔW‖².
    """
    ranks = dict.fromkeys(spectra, 1)
    left = parameters - sum(s.cost for s in spectra.values())
    queue = [(-s.squares[1] / s.cost, layer) for layer, s in spectra.items() if len(s.values) > 1]
    heapq.heapify(queue)
    while queue:
        _, layer = heapq.heappop(queue)
        values, cost = spectra[layer].squares, spectra[layer].cost
        if cost > left:
            continue
        ranks[layer] += 1
        left -= cost
        if ranks[layer] < len(values):
            heapq.heappush(queue, (-values[ranks[layer]] / cost, layer))
    return ranks


def _within(
    file: LoRAFile, directions: Mapping[str, Triples], spectra: Mapping[str, Spectrum], limit: int, folder: Path
) -> dict[str, int]:
    """Return the ranks whose folder has at most `limit` bytes. Raises FileError where rank 1 has more."""
    item = max(A.element_size() for A, _ in file.factors.values())
    least = peft.size(truncated(file, directions, dict.fromkeys(spectra, 1)))
    if least > limit:
        raise FileError(f"{folder} cannot be cut to {limit:,} bytes: with rank 1 in every layer it takes {least:,}.")
    parameters = (limit - least) // item + sum(s.cost for s in spectra.values())
    while True:
        ranks = _told_apart(allocated(spectra, parameters), file)
        over = peft.size(truncated(file, directions, ranks)) - limit
        if over <= 0:
            return ranks
        parameters -= -(-over // item)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of an adapter's files in a folder, without a tokenizer's beside them."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.name in (CONFIG, WEIGHTS, PICKLED))
