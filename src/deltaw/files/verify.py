"""Is this checkpoint that base with that adapter merged into it, and is this adapter of that base? By their files alone, one
tensor at a time. No model code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import FileError, MergeError
from deltaw.files.formats import peft
from deltaw.files.formats.fingerprint import bits_of
from deltaw.files.formats.safetensors import PIECE, Entry, Shard, read_tensor, shards_of
from deltaw.files.locate import check_by_files, hash_of_layers, places_of
from deltaw.layers.names import in_order
from deltaw.layers.ops.merging import merge_


def verify_adapter(base: str | Path, adapter: str | Path) -> str:
    """ "same" when the adapter in folder `adapter` was trained on the checkpoint in folder `base`, "cast" when on that one
    in another precision. Raises FileError when the adapter does not fit it, or does not say what it was trained on;
    BaseMismatch when on other weights."""
    base, adapter = Path(base), Path(adapter)
    shards, file = shards_of(base), peft.read(adapter)
    places = places_of(shards, file, base)
    if peft.W0 not in file.metadata:
        raise FileError(
            f"The adapter in {adapter} fits {base} by its layers' names and shapes, but it has no fingerprint of its base (it "
            "was not written by deltaw): which weights it was trained on cannot be told."
        )
    verdict = peft.check_base(file, adapter, peft.W0, partial(hash_of_layers, shards, places))
    if verdict == "unknown":
        raise FileError(
            f"The adapter in {adapter} fits {base} by its layers' names and shapes, but an older version of deltaw wrote it and "
            "named its base by a sample of its entries: which weights it was trained on cannot be told for sure."
        )
    return verdict


def verify_merged(merged: str | Path, base: str | Path, adapter: str | Path) -> int:
    """The number of layers that the adapter changed, when the checkpoint in folder `merged` is the one in `base` with the
    adapter's ΔW in it, bit for bit. Raises MergeError with each tensor that is not; FileError for files that are not
    sound."""
    merged, base, adapter = Path(merged), Path(base), Path(adapter)
    file = peft.read(adapter)
    check_by_files(file)
    base_shards = shards_of(base)
    places = places_of(base_shards, file, base, untie=True)
    layers = {place.untied or place.tensor: layer for layer, place in places.items()}
    theirs, own = _entries(shards_of(merged)), _entries(base_shards)
    own |= {place.untied: own[place.tensor] for place in places.values() if place.untied}
    problems = {name: f"{name} is missing" for name in own.keys() - theirs.keys()}
    problems |= {name: f"{name} is not in the base" for name in theirs.keys() - own.keys()}
    for name in own.keys() & theirs.keys():
        layer = layers.get(name)
        merge = None if layer is None else lambda W, at=layer: merge_(places[at].W0(W), file.change(at))
        if why := _unequal(own[name], theirs[name], merge):
            problems[name] = f"{name}{why}"
    if problems:
        lines = [problems[name] for name in in_order(problems)]
        raise MergeError(f"{merged} is not {base} with {adapter} merged into it:", lines)
    return len(layers)


def _unequal(
    base: tuple[Shard, Entry], merged: tuple[Shard, Entry], merge: Callable[[Tensor], object] | None
) -> str | None:
    """How the tensor at `merged` is another than the one at `base` after `merge`, if there is one for it."""
    (_, entry), (_, found) = base, merged
    if (entry.dtype, entry.shape) != (found.dtype, found.shape):
        return f" is {found.dtype} {list(found.shape)}, in the base {entry.dtype} {list(entry.shape)}"
    expected = _read(*base)
    if merge is not None:
        merge(expected)
    differ = _differences(expected.reshape(-1), _read(*merged).reshape(-1))
    if not differ:
        return None
    return f": {differ:,} of {expected.numel():,} entries differ{' from base + ΔW' if merge is not None else ''}"


def _differences(expected: Tensor, actual: Tensor) -> int:
    """How many entries differ, a piece at a time: what is compared takes memory too."""
    pieces = zip(bits_of(expected).split(PIECE), bits_of(actual).split(PIECE), strict=True)
    return sum(int(torch.count_nonzero(one != other)) for one, other in pieces)


def _entries(shards: list[Shard]) -> dict[str, tuple[Shard, Entry]]:
    return {name: (shard, entry) for shard in shards for name, entry in shard.entries.items()}


def _read(shard: Shard, entry: Entry) -> Tensor:
    with shard.path.open("rb") as stream:
        return read_tensor(stream, entry)[1]
