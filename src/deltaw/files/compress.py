"""An adapter cut to fewer directions, in each layer the first of its ΔW: the nearest one there is of that rank. Reads and writes
files; knows no models."""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deltaw.errors import ConfigError, FileError
from deltaw.files.formats import peft
from deltaw.files.formats.model_folder import copy_files
from deltaw.files.formats.peft import SLICES, LoRAFile, names_in_peft
from deltaw.files.formats.peft_config import CONFIG, PICKLED, WEIGHTS, config_for
from deltaw.files.formats.peft_keys import in_file
from deltaw.files.spectrum import Spectrum, spectra_of, triples_of
from deltaw.files.units import parse_size
from deltaw.layers.ops.svd import Triples

_Value = TypeVar("_Value")
_CONFIGURED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")


@dataclass(frozen=True)
class Compressed:
    """What `compress` made."""

    path: Path
    ranks: dict[str, int]
    """Layer name → rank."""
    errors: dict[str, float]
    """Layer name → ‖ΔW − ΔW'‖ / ‖ΔW‖, Frobenius norms."""
    error: float
    """The same of all layers together."""
    bytes_before: int
    bytes: int
    """Of the adapter's files."""


def compress(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size: int | str | None = None,
) -> Compressed:
    """Write the adapter in the folder `adapter` with fewer directions to `out`, atomically; it stays an ordinary adapter.

    Give one of: `rank`, the most that any layer keeps; `energy`, the share of each layer's ‖ΔW‖² to keep; `size`, the most
    bytes that the folder may take ("1MB"), spent where a byte keeps the most of ‖ΔW‖². No layer has less than rank 1. What a
    file has besides A and B stays.

    Raises ConfigError for settings out of range, FileError for an adapter that cannot be read, or cannot be so small; `out` is
    then as it was.
    """
    folder, out = Path(adapter), Path(out)
    given = [name for name, value in (("rank", rank), ("energy", energy), ("size", size)) if value is not None]
    if len(given) != 1:
        raise ConfigError(f"compress takes one of rank, energy and size; it got {' and '.join(given) or 'none'}.")
    if (rank is not None and rank < 1) or (energy is not None and not 0.0 < energy <= 1.0):
        raise ConfigError(f"rank must be at least 1 and energy above 0 and at most 1 (they are {rank} and {energy}).")
    file = peft.read(folder)
    found = triples_of(file, folder)
    spectra = spectra_of(found)
    if size is not None:
        limit = parse_size(size, "size") if isinstance(size, str) else size
        ranks = _within(file, found, spectra, limit, folder)
    else:
        ranks = {
            layer: min(rank, len(s.values)) if rank is not None else s.rank_for(energy or 1.0)
            for layer, s in spectra.items()
        }
        ranks = _told_apart(ranks, file)
    peft.write(out, truncated(file, found, ranks), lambda made: copy_files(folder, made))
    errors = {layer: math.sqrt(max(0.0, 1.0 - s.energy(ranks[layer]))) for layer, s in spectra.items()}
    total = sum(s.norm**2 for s in spectra.values())
    missing = sum((errors[layer] * s.norm) ** 2 for layer, s in spectra.items())
    return Compressed(
        out, _shown(ranks, file), _shown(errors, file), math.sqrt(missing / total) if total else 0.0, folder_bytes(folder),
        folder_bytes(out),
    )  # fmt: skip


def _shown(values: Mapping[str, _Value], file: LoRAFile) -> dict[str, _Value]:
    return {file.shown(layer): x for layer, x in values.items()}


def truncated(file: LoRAFile, found: Mapping[str, Triples], ranks: Mapping[str, int]) -> LoRAFile:
    """The file with the first so many directions of each layer's ΔW, which `found` has. A layer that keeps all it has is as it
    was; of the others the scale is in A and B, which have equal norms."""
    factors, scales, biases = dict(file.factors), dict(file.scales), dict(file.biases)
    own_ranks = {layer: file.rank(layer) for layer in factors}
    cut = [layer for layer, rank in own_ranks.items() if ranks[layer] < rank]
    for layer in cut:
        dtype = file.factors[layer][0].dtype
        A, B, _ = found[layer].cut(rank=ranks[layer])
        factors[layer] = in_file(A.to(dtype), B.to(dtype))
        scales[layer] = 1.0
        if layer in biases:
            biases[layer] = biases[layer] * file.scales[layer]
    if not cut:
        return file
    kept = {layer: min(rank, ranks[layer]) for layer, rank in own_ranks.items()}
    config = config_for(
        _by_names(kept, file), _by_names(scales, file), target_modules=[], dropout=0.0, rank_stabilised=False, transposed=False,
        base=None, task=None, target_parameters=file.config.get("target_parameters"),
    )  # fmt: skip
    metadata = dict(file.metadata)
    if SLICES in metadata:  # their A's and B's are no longer apart
        slices = {layer: own for layer, own in json.loads(metadata.pop(SLICES)).items() if layer not in cut}
        metadata |= {SLICES: json.dumps(slices)} if slices else {}
    return dataclasses.replace(
        file, factors=factors, scales=scales, biases=biases, metadata=metadata,
        config=file.config | {key: config[key] for key in _CONFIGURED},
    )  # fmt: skip


def _by_names(values: Mapping[str, _Value], file: LoRAFile) -> dict[str, _Value]:
    """Values of layers by the names that these have in the file, and those that PEFT's patterns know them by."""
    return {name: x for layer, x in values.items() for name in names_in_peft(layer, file)} | dict(values)


def _told_apart(ranks: Mapping[str, int], file: LoRAFile) -> dict[str, int]:
    """The same or larger ranks, as PEFT can read them: layers that it knows by the same names have one."""
    names = {layer: tuple(names_in_peft(layer, file)) for layer in ranks}
    most: dict[tuple[str, ...], int] = {}
    for layer, rank in ranks.items():
        most[names[layer]] = max(rank, most.get(names[layer], 1))
    return {layer: most[names[layer]] for layer in ranks}


def allocated(spectra: Mapping[str, Spectrum], parameters: int) -> dict[str, int]:
    """Layer name → rank, at least 1, within so many parameters altogether: one direction after the other where a parameter
    keeps the most of ‖ΔW‖²."""
    ranks = dict.fromkeys(spectra, 1)
    left = parameters - sum(s.cost for s in spectra.values())
    queue = [(-s.squares[1] / s.cost, layer) for layer, s in spectra.items() if len(s.values) > 1]
    heapq.heapify(queue)
    while queue:
        _, layer = heapq.heappop(queue)
        own, cost = spectra[layer], spectra[layer].cost
        if cost > left:
            continue
        ranks[layer] += 1
        left -= cost
        if ranks[layer] < len(own.values):
            heapq.heappush(queue, (-own.squares[ranks[layer]] / cost, layer))
    return ranks


def _within(
    file: LoRAFile, found: Mapping[str, Triples], spectra: Mapping[str, Spectrum], limit: int, folder: Path
) -> dict[str, int]:
    """The ranks whose folder is no larger than `limit`."""
    item = max(A.element_size() for A, _ in file.factors.values())
    least = peft.size(truncated(file, found, dict.fromkeys(spectra, 1)))
    if least > limit:
        raise FileError(f"{folder} cannot be cut to {limit:,} bytes: with rank 1 in every layer it takes {least:,}.")
    parameters = (limit - least) // item + sum(s.cost for s in spectra.values())
    while True:
        ranks = _told_apart(allocated(spectra, parameters), file)
        over = peft.size(truncated(file, found, ranks)) - limit
        if over <= 0:
            return ranks
        parameters -= -(-over // item)


def folder_bytes(folder: Path) -> int:
    """Of an adapter's files in a folder, without a tokenizer's beside them."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.name in (CONFIG, WEIGHTS, PICKLED))
