"""Is this checkpoint that base with that adapter merged into it, and is this adapter of that base?

Both are told by files alone, one tensor at a time. No model code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import BaseMismatch, FileError, MergeError, first_line
from deltaw.files.formats import peft
from deltaw.files.formats.fingerprint import bits_of
from deltaw.files.formats.locate import check_by_files, hash_of_layers, places_of
from deltaw.files.formats.safetensors import PIECE, Entry, Shard, read_tensor, shards_of
from deltaw.layers.names import in_order
from deltaw.layers.ops.merging import merge_


def verify_adapter(base: str | Path, adapter: str | Path) -> str:
    """Tell whether an adapter was trained on a checkpoint.

    Args:
        base: folder of the checkpoint.
        adapter: folder of the adapter.

    Returns:
        "same", or "cast" for the same weights in another precision.

    Raises:
        FileError: when the adapter does not fit the checkpoint, or does not say what it was trained on.
        BaseMismatch: when it was trained on other weights.
    """
    base, adapter = Path(base), Path(adapter)
    shards, file = shards_of(base), peft.read(adapter)
    places = places_of(shards, file, base)
    fits = f"The adapter in {adapter} fits {base} by its layers' names and shapes, but"
    if peft.W0 not in file.metadata:
        raise FileError(
            f"{fits} it has no fingerprint of its base (it was not written by deltaw): which weights it was trained on cannot be "
            "told."
        )
    hash_of, trained_on = partial(hash_of_layers, shards, places), file.config.base
    try:
        verdict = peft.check_base(file.metadata, adapter, peft.W0, hash_of, trained_on)
    except BaseMismatch as error:
        raise BaseMismatch(first_line(error)) from None  # what to do about it is of commands that go on
    if verdict == "unknown":
        raise FileError(
            f"{fits} an older version of deltaw wrote it and named its base by a sample of its entries: which weights it was "
            "trained on cannot be told for sure."
        )
    return verdict


def verify_merged(merged: str | Path, base: str | Path, adapter: str | Path) -> int:
    """Check that a checkpoint is a base with an adapter's ΔW in it, bit for bit.

    Args:
        merged: folder of the merged checkpoint.
        base: folder of the base.
        adapter: folder of the adapter.

    Returns:
        The number of layers that the adapter changed.

    Raises:
        MergeError: with each tensor that is another one.
        FileError: for files that are not sound.
    """
    merged, base, adapter = Path(merged), Path(base), Path(adapter)
    file = peft.read(adapter)
    check_by_files(file)
    base_shards = shards_of(base)
    places = places_of(base_shards, file, base, untie=True)
    layers = {place.untied or place.tensor: layer for layer, place in places.items()}
    in_merged, in_base = _entries(shards_of(merged)), _entries(base_shards)
    in_base |= {place.untied: in_base[place.tensor] for place in places.values() if place.untied}
    problems = {name: f"{name} is missing" for name in in_base.keys() - in_merged.keys()}
    problems |= {name: f"{name} is not in the base" for name in in_merged.keys() - in_base.keys()}
    for name in in_base.keys() & in_merged.keys():
        layer = layers.get(name)
        merge = None if layer is None else lambda W, at=layer: merge_(places[at].W0(W), file.change(at))
        if why := _unequal(in_base[name], in_merged[name], merge):
            problems[name] = f"{name}{why}"
    if problems:
        lines = [problems[name] for name in in_order(problems)]
        raise MergeError(f"{merged} is not {base} with {adapter} merged into it:", lines)
    return len(layers)


def _unequal(
    base: tuple[Shard, Entry], merged: tuple[Shard, Entry], merge: Callable[[Tensor], object] | None
) -> str | None:
    """Say how the tensor at `merged` differs from the one at `base` after `merge` in place; None if it does not."""
    (_, entry), (_, other) = base, merged
    if (entry.dtype, entry.shape) != (other.dtype, other.shape):
        return f" is {other.dtype} {list(other.shape)}, in the base {entry.dtype} {list(entry.shape)}"
    expected = _read(*base)
    if merge is not None:
        merge(expected)
    differ = _differences(expected.reshape(-1), _read(*merged).reshape(-1))
    if not differ:
        return None
    return f": {differ:,} of {expected.numel():,} entries differ{' from base + ΔW' if merge is not None else ''}"


def _differences(expected: Tensor, actual: Tensor) -> int:
    """Count the entries that differ between two flat tensors, a piece at a time: what is compared takes memory too."""
    one, other = bits_of(expected), bits_of(actual)
    starts = range(0, len(one), PIECE)
    return sum(int(torch.count_nonzero(one[at : at + PIECE] != other[at : at + PIECE])) for at in starts)


def _entries(shards: list[Shard]) -> dict[str, tuple[Shard, Entry]]:
    """Return tensor name → its shard and its entry there."""
    return {name: (shard, entry) for shard in shards for name, entry in shard.entries.items()}


def _read(shard: Shard, entry: Entry) -> Tensor:
    with shard.path.open("rb") as stream:
        return read_tensor(stream, entry)[1]
