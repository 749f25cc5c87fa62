"""The places of an adapter's layers in a checkpoint's files, told by the names of its tensors. No model code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import FileError, nearest
from deltaw.files.formats.fingerprint import DTYPES, Digest, combined, digest
from deltaw.files.formats.model_folder import config_of
from deltaw.files.formats.peft.adapter import LoRAFile
from deltaw.files.formats.peft.metadata import transposed_layers
from deltaw.files.formats.peft.targets import told_by_name
from deltaw.files.formats.safetensors import DTYPES as CODES
from deltaw.files.formats.safetensors import Entry, Shard, read_tensor
from deltaw.layers.names import found_as, unwrapped

_TIES = "tie_word_embeddings"
# transformers' models with Conv1D layers, whose weights are stored [k, d]
_WITH_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}


class NotByFiles(FileError):
    """The checkpoint's files alone do not say where the adapter's layers are, or how they are stored.

    With the model opened, the adapter may still be merged in memory.
    """


@dataclass(frozen=True)
class Place:
    """The place of one layer's weight in a checkpoint."""

    tensor: str
    transposed: bool
    """Stored [k, d], as GPT-2's Conv1D is."""
    untied: str | None = None
    """The name of the new tensor of a head that shares the embedding's, beside that; None for other layers."""

    def W0(self, tensor: Tensor) -> Tensor:
        """Return the weight as a [d, k] view of a tensor."""
        return tensor.t() if self.transposed else tensor.flatten(1)


def places_of(shards: list[Shard], file: LoRAFile, folder: Path, *, untie: bool = False) -> dict[str, Place]:
    """Return layer → its place, of each of the adapter's layers with A and B.

    Args:
        shards: the checkpoint's.
        file: the adapter.
        folder: the checkpoint's.
        untie: find a head, too, that shares its embedding's tensor.

    Raises:
        FileError: with every layer that is not there, or is of another shape.
    """
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    tensor_of = {layer: _tensor_of(layer, entries) for layer in file.factors}
    heads = {n: _embedding_of(n, file, entries, folder) for n, tensor in tensor_of.items() if untie and tensor is None}
    tensor_of |= heads
    unclear = [
        f"there is no tensor of the layer {layer!r}{nearest(f'{layer}.weight', entries, count=1)}"
        for layer, name in tensor_of.items()
        if name is None
    ]
    tensors = {layer: name for layer, name in tensor_of.items() if name is not None}
    problems = [f"{name} would be the weight of both {one!r} and {other!r}" for name, one, other in _twins(tensors)]
    shapes = {layer: (file.factors[layer][1].shape[0], file.factors[layer][0].shape[1]) for layer in tensors}
    transposed = _transposed(file, folder, {layer: entries[name].shape for layer, name in tensors.items()}, shapes)
    for layer, name in tensors.items():
        entry, wanted = entries[name], shapes[layer]
        stored = (wanted[0], *file.kernels[layer]) if layer in file.kernels else wanted
        if entry.shape != (stored[::-1] if transposed[layer] else stored):
            problems.append(f"{name} is {list(entry.shape)}, the update of {layer!r} {list(wanted)}")
        elif entry.dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} is {entry.dtype}; ΔW goes into F64, F32, F16 and BF16 only")
    unclear += [
        f"how {tensors[n]} is stored, which is square, cannot be told" for n, way in transposed.items() if way is None
    ]
    if unclear or problems:
        error = FileError if problems else NotByFiles
        head = f"The adapter does not fit the checkpoint in {folder}; nothing was written:"
        raise error(head, [*unclear, *problems])
    named = {layer: f"{unwrapped(layer)}.weight" if layer in heads else None for layer in tensors}
    return {layer: Place(name, bool(transposed[layer]), named[layer]) for layer, name in tensors.items()}


def _embedding_of(layer: str, file: LoRAFile, entries: Mapping[str, Entry], folder: Path) -> str | None:
    """Return the tensor that a head is tied to; None where that cannot be told.

    In a model with one embedding it is the only one of its shape that has a row for each token.
    """
    config = config_of(folder)
    if config is None or config.get("is_encoder_decoder") or config.get(_TIES) is False:
        return None
    shape = (file.factors[layer][1].shape[0], file.factors[layer][0].shape[1])
    alike = [name for name, entry in entries.items() if entry.shape == shape]
    return alike[0] if len(alike) == 1 and config.get("vocab_size") == shape[0] and not _parent(layer) else None


def stored_twice(shards: list[Shard], places: Mapping[str, Place], folder: Path) -> list[str]:
    """Return the layers whose tensor, a row for each token, the checkpoint has twice, where its model may tie the two."""
    config = config_of(folder)
    if config is None or config.get(_TIES) is False:
        return []
    entries = {name: (shard, entry) for shard in shards for name, entry in shard.entries.items()}
    layers = []
    for layer, place in places.items():
        entry = entries[place.tensor][1]
        if place.untied is None and entry.shape and entry.shape[0] == config.get("vocab_size"):
            alike = [n for n, (_, e) in entries.items() if n != place.tensor and e[:2] == entry[:2]]
            if any(_bytes(*entries[n]) == _bytes(*entries[place.tensor]) for n in alike):
                layers.append(layer)
    return layers


def _bytes(shard: Shard, entry: Entry) -> bytearray:
    with shard.path.open("rb") as stream:
        return read_tensor(stream, entry)[0]


def _parent(layer: str) -> str:
    """Return the name of the module around a layer, without what wrappers have put there."""
    return unwrapped(layer).removeprefix("module.").rpartition(".")[0]


def check_by_files(file: LoRAFile, *, undone: bool = False) -> None:
    """Check that a merge by files alone can apply an adapter.

    Args:
        file: the adapter.
        undone: the merge is to be undone, as DoRA's, whose ΔW depends on W0, cannot be.

    Raises:
        NotByFiles: for an adapter that changes more than files tell: embeddings, which a head may share, biases, tokens and whole
            modules.
    """
    unclear = [layer for layer in file.unclear if not told_by_name(layer, file.config)]
    if unclear:
        raise NotByFiles("Whether the adapter's settings mean these layers, only the model can tell:", sorted(unclear))
    others = [name for names in file.beyond().values() for name in names if undone or name not in file.magnitudes]
    if others:
        kinds = "A and B" if undone else "A and B, and DoRA's magnitudes,"
        raise NotByFiles(f"By files alone only {kinds} of dense layers are merged; this adapter has more, for", others)


def _twins(tensors: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield each tensor that would be the weight of two layers, with both."""
    first: dict[str, str] = {}
    for layer, name in tensors.items():
        if first.setdefault(name, layer) != layer:
            yield name, first[name], layer


def _transposed(
    file: LoRAFile, folder: Path, stored: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, bool | None]:
    """Return layer → whether it is stored [k, d]; None where that cannot be told.

    Our files say it, with others the shapes do. Of square layers only the kind of model does: PEFT writes one fan_in_fan_out for
    all layers, by the last one that it met.
    """
    transposed, told = transposed_layers(file.metadata), dict[str, bool | None]()
    if transposed is None:
        square = False if _all_linear(folder) else None
        told = {n: square if d == k else stored[n] == (k, d) for n, (d, k) in shapes.items()}
        told |= dict.fromkeys(file.kernels, False)
    else:
        told = {n: n in transposed for n in stored}
    return told | {n: True for n in stored if n in file.embeddings}


def _all_linear(folder: Path) -> bool:
    """Return whether the model whose config is in `folder` is surely none of those with Conv1D layers."""
    kind = (config_of(folder) or {}).get("model_type")
    return isinstance(kind, str) and kind not in _WITH_CONV1D


def _tensor_of(layer: str, entries: Mapping[str, Entry]) -> str | None:
    """Return the name of a layer's weight in the files.

    It is the layer's; or without the base model's prefix, or with one, where just one tensor is named so.
    """
    full = found_as(f"{layer}.weight", entries, {}) or f"{layer}.weight"
    if full in entries:
        return full
    shorter = full.split(".", 1)[-1]
    alike = [n for n in entries if n == shorter or n.endswith(f".{full}")]
    return alike[0] if len(alike) == 1 else None


def hash_of_layers(shards: list[Shard], places: Mapping[str, Place], form: str) -> str:
    """Return the hash of one form, over the weights that an adapter's layers have in the files."""
    digests = {}
    layers = {place.tensor: layer for layer, place in places.items()}
    for shard in shards:
        with shard.path.open("rb") as stream:
            for name in shard.entries.keys() & layers.keys():
                digests[layers[name]] = _digest(stream, shard.entries[name], form)
    return combined(digests[layer] for layer in sorted(digests))


def _digest(stream: BufferedReader, entry: Entry, form: str) -> Digest:
    if form == DTYPES:  # of which the header tells enough
        return digest(torch.empty(entry.shape, dtype=CODES[entry.dtype], device="meta"), form)
    return digest(read_tensor(stream, entry)[1], form)
