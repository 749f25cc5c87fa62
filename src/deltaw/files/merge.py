"""Merge an adapter into a checkpoint on disk, and take it out again, one tensor in memory at a time.

No model is opened: layers are told by the names of their tensors. The arithmetic is that of a merge in memory
(layers/ops/merging.py), so the bits are too. With a correction file, what was written can be turned back into the base's own
bytes, which is checked by their hash.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw.errors import FileError, MergeError
from deltaw.files.formats import correction, model_folder, peft
from deltaw.files.formats.atomic import SIGNED, check_apart, check_replaceable, files_written, replacing_folder, sign
from deltaw.files.formats.fingerprint import EXACT, Digest, bytes_of, combined, digest
from deltaw.files.formats.locate import NotByFiles, Place, check_by_files, hash_of_layers, places_of, stored_twice
from deltaw.files.formats.older_readers import add_older_settings
from deltaw.files.formats.peft import LoRAFile
from deltaw.files.formats.safetensors import INDEX, Other, Rewritten, Shard, rewrite, shards_of, with_tensors
from deltaw.files.formats.strict_json import read_object
from deltaw.layers.ops.merging import MergeStats, merge_, merge_reversibly_, restore_, restored_within
from deltaw.layers.ops.residual import integers_of
from deltaw.layers.ties import untied_config
from deltaw.model import inputs
from deltaw.model.merging.report import check_merged
from deltaw.progress import say, shown

# Weights in other formats than the one that is merged: stale beside it
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".safetensors"}


# --- merging ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergedFiles:
    """The result of `merge_files`."""

    layers: dict[str, MergeStats]
    bytes: int
    """Bytes of the weights that were written."""
    correction: int
    """Bytes of the correction file; 0 without one."""


def merge_files(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    reversible: bool = False,
    check_base: bool = True,
    untie: bool = False,
    look: Callable[[Path], None] = lambda folder: None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> MergedFiles:
    """Write a checkpoint with an adapter's ΔW in it, in the dtypes that it is stored in.

    Config and tokenizer go along, and the adapter's tokenizer or chat template in their place where its folder has another. The
    tokens that the adapter was taught to end with are added to those that generation_config.json names. Settings are also written
    by their older names, which transformers 5 leaves out. At most one and a half times the largest tensor is held in memory.

    Args:
        base: folder of a safetensors checkpoint.
        adapter: folder of a LoRA or DoRA adapter.
        out: the folder to write, in one piece; a merged model that was there is replaced.
        reversible: write a correction file too, with which `unmerge_files` gives the base's bytes back.
        check_base: refuse an adapter of other base weights.
        untie: give a head that shares the embedding's tensor one of its own, and say so in the config.
        look: called with the finished folder before it takes `out`'s place.
        trust_remote_code: run Python code that comes with the tokenizers.
        progress: show what goes on: a line that moves in a terminal and a notebook, nothing elsewhere.

    Returns:
        What the merge did to each layer, and the sizes of what was written.

    Raises:
        ConfigError: for an `out` that is, holds or lies in the base or the adapter, or holds what no merge wrote.
        NotByFiles: a FileError, where a merge in memory may still do.
        FileError: for files that cannot be read, do not fit, or cannot be written.
        BaseMismatch: for an adapter of other base weights.
        MergeError: for a merge that would change nothing or is not finite. `out` is then as it was, and after an error of `look`.

    >>> import torch, deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=2, targets="q"))
    >>> _ = [torch.nn.init.ones_(parameter) for parameter in deltaw.parameters(model)]  # as if it had been trained
    >>> adapter = deltaw.save(model, "to-merge")
    >>> list(deltaw.merge_files("model", adapter, "merged").layers)
    ['model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.q_proj']
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    model_folder.check_place(out, {"the base": base, "the adapter": adapter})
    shards, file = shards_of(base), _lora(adapter)
    check_by_files(file, undone=reversible)
    places, ends = places_of(shards, file, base, untie=untie), peft.ends_of(file.metadata, adapter)
    twice = stored_twice(shards, places, base)
    if twice and not untie:
        raise NotByFiles("The checkpoint has weights twice that its model ties, and one would change:", twice)
    if check_base:
        hash_of, trained_on = partial(hash_of_layers, shards, places), file.config.base
        peft.check_base(file.metadata, adapter, peft.W0, hash_of, trained_on)
    brings_tokenizer = _brings_tokenizer(base, adapter, check_base, trust_remote_code)
    with shown(progress, "merge"), replacing_folder(out) as folder:
        with _correction(folder, file, reversible) as kept:
            stats = _write_merged(shards, places, file, folder, kept)
            check_merged(stats, allow_unchanged=False)
            _copy_the_rest(base, folder)
            before = _beside(folder)
            if brings_tokenizer:
                model_folder.replace_files(adapter, folder, trust_remote_code=trust_remote_code)
            if twice or any(place.untied for place in places.values()):
                _say_untied(folder, shards, places)
            model_folder.stop_at(folder, ends)
            add_older_settings(folder, trust_remote_code=trust_remote_code)
            if kept is not None:
                kept.keep(before, _beside(folder))
        sign(folder)
        look(folder)
    size = sum((out / shard.path.name).stat().st_size for shard in shards)
    path = out / correction.NAME
    return MergedFiles(stats, size, path.stat().st_size if reversible else 0)


def _write_merged(
    shards: list[Shard], places: Mapping[str, Place], file: LoRAFile, folder: Path, kept: correction.Writer | None
) -> dict[str, MergeStats]:
    """Write the shards with ΔW in them, and what gives them back into the correction. Return layer → what the merge did."""
    stats: dict[str, MergeStats] = {}

    def change(layer: str, tensor: Tensor) -> None:
        say("merging", len(stats), len(places))
        place = places[layer]
        W0 = place.W0(tensor)
        if kept is None or place.untied is not None:
            stats[layer] = merge_(W0, file.change(layer))
        else:
            stats[layer], residual = merge_reversibly_(W0, file.product(layer))
            kept.put(place.tensor, residual, tuple(W0.shape))

    for shard in shards:
        name, other = shard.path.name, _with_heads(shard, places, change)
        hashes = rewrite(shard, folder / name, _changes(shard, places, change), digest=kept is not None, other=other)
        if kept is not None:
            kept.manifest.shards[name] = (hashes.before, hashes.after)
            if other is not None:
                kept.keep_header(name, shard.header, other.added)
    return stats


def _brings_tokenizer(base: Path, adapter: Path, check: bool, trust: bool) -> bool:
    """Return whether the adapter's folder has a tokenizer or a chat template that the base's has not.

    Raises NotByFiles where that has tokens which the checkpoint has no rows for.
    """
    if not model_folder.files_in(adapter):
        return False
    has_tokenizer = bool(model_folder.files_in(base))
    of_base = model_folder.open_tokenizer(base, trust_remote_code=trust) if has_tokenizer else None
    tokenizer = model_folder.brought(adapter, of_base, check=check, trust_remote_code=trust)
    if tokenizer is None:
        return False
    rows = _rows(base)
    if beyond := inputs.tokens_beyond(tokenizer, rows or 0):
        last = max(beyond.values())
        raise NotByFiles(
            f"The tokenizer in {adapter} has tokens up to {last}, the checkpoint rows for {rows}: by files alone none are added."
        )
    return True


def _rows(base: Path) -> int | None:
    """Return how many tokens the model in a folder has, by its config."""
    config = model_folder.config_of(base) or {}
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else None


def _beside(folder: Path) -> dict[str, bytes]:
    """Return what a merge may replace beside the weights: name in the folder → content."""
    names = (model_folder.CONFIG, model_folder.GENERATION_CONFIG, INDEX)
    there = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return there | model_folder.contents(folder)


def _with_heads(shard: Shard, places: Mapping[str, Place], change: Callable[[str, Tensor], None]) -> Other | None:
    """Return how a merged file is another one where heads get tensors of their own; None where it is not."""
    added = {
        p.untied: (p.tensor, partial(change, n)) for n, p in places.items() if p.untied and p.tensor in shard.entries
    }
    if not added:
        return None
    return Other(with_tensors(shard, {name: origin for name, (origin, _) in added.items()}), added)


def _say_untied(folder: Path, shards: list[Shard], places: Mapping[str, Place]) -> None:
    """Write in a merged folder's config that the head has a tensor of its own, and into its index where that is."""
    path = folder / model_folder.CONFIG
    config = untied_config(read_object(path))
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not (path := folder / INDEX).is_file():
        return
    index: dict[str, Any] = read_object(path)
    for place in places.values():
        if place.untied:
            shard = next(s for s in shards if place.tensor in s.entries)
            index["weight_map"][place.untied] = shard.path.name
            if "total_size" in (sizes := index.get("metadata", {})):
                sizes["total_size"] += shard.entries[place.tensor].size
    path.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _lora(adapter: Path) -> LoRAFile:
    """Read a LoRA adapter. Raises NotByFiles for one of another method."""
    method = peft.method_of(adapter)
    if method is not None:
        raise NotByFiles(
            f"{adapter} holds a {method} adapter: on disk LoRA's updates alone are merged, others in memory."
        )
    return peft.read(adapter, of_model=True)


# --- unmerging --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnmergedFiles:
    """The result of `unmerge_files`."""

    layers: int
    corrected: bool
    """A correction file was there."""
    exact: bool
    """The base's own bits are back: by each file's sha256 with a correction, else by the fingerprint of the merged layers'
    weights that the adapter carries."""
    largest_error: float
    """The most that an entry can be from the base's; 0 with a correction."""


@dataclass(frozen=True)
class _Subtracted:
    """Notes on layers from which ΔW is subtracted without a correction."""

    errors: list[float] = field(default_factory=lambda: [0.0])
    """The most that an entry of each layer can be off."""
    digests: dict[str, Digest] = field(default_factory=dict)
    """Layer → its part in the hash of all of them."""


def unmerge_files(merged: str | Path, adapter: str | Path, out: str | Path) -> UnmergedFiles:
    """Write the base of a merged checkpoint.

    With the correction file of a reversible merge the files are the base's own, byte for byte, checked by their hash. Without
    one ΔW is subtracted, and generation_config.json stays as the merge left it.

    Args:
        merged: folder of a checkpoint that `merge_files` wrote.
        adapter: folder of the adapter that was merged into it.
        out: the folder to write, in one piece; a base or merged model of such weights that was there is replaced.

    Returns:
        How many layers were changed, whether the base's own bits are back, and if not how far an entry can be from them.

    Raises:
        ConfigError: for an `out` that is, holds or lies in `merged` or the adapter, or holds something else than a base of it.
        FileError: for files that cannot be read, do not fit, or cannot be written.
        MergeError: for a checkpoint or an adapter that the correction does not belong to, and for a hash that differs. `out` is
            then not written.

    >>> import torch, deltaw
    >>> from transformers import AutoModelForCausalLM
    >>> model = deltaw.attach(AutoModelForCausalLM.from_pretrained("model"), deltaw.LoRA(rank=2, targets="q"))
    >>> _ = [torch.nn.init.ones_(parameter) for parameter in deltaw.parameters(model)]  # as if it had been trained
    >>> adapter = deltaw.save(model, "to-unmerge")
    >>> _ = deltaw.merge_files("model", adapter, "reversible", reversible=True)
    >>> deltaw.unmerge_files("reversible", adapter, "base-again").exact
    True
    """
    merged, adapter, out = Path(merged), Path(adapter), Path(out)
    check_apart(out, {"the merged model": merged, "the adapter": adapter})
    shards, file = shards_of(merged), _lora(adapter)
    check_replaceable(out, "a base of this model", lambda folder: _others_than_base(folder, merged, shards))
    check_by_files(file, undone=True)
    places = places_of(shards, file, merged)
    kept = correction.Reader(merged / correction.NAME) if (merged / correction.NAME).is_file() else None
    if kept is not None and kept.manifest.adapter != digest_of(file):
        raise MergeError(
            f"The adapter in {adapter} is not the one that was merged into {merged}: its A, B or scales differ."
        )
    notes = _Subtracted()
    with replacing_folder(out) as folder:
        for shard in shards:
            _write_unmerged(shard, places, file, folder, kept, notes)
        _copy_the_rest(merged, folder)
        if kept is not None:
            kept.put_back(folder)
    expected = peft.fingerprint_of(file.metadata, adapter, peft.W0)
    same = expected is not None and expected.exact == combined(notes.digests[layer] for layer in sorted(notes.digests))
    return UnmergedFiles(len(places), kept is not None, kept is not None or same, max(notes.errors))


def _write_unmerged(
    shard: Shard, places: Mapping[str, Place], file: LoRAFile, folder: Path, kept: correction.Reader | None, notes: _Subtracted
) -> None:  # fmt: skip
    """Write one shard without ΔW. Raises MergeError where a hash is another one than the correction's."""
    name, other = shard.path.name, None

    def change(layer: str, tensor: Tensor) -> None:
        place = places[layer]
        W = place.W0(tensor)
        if kept is None:
            largest = W.abs().max()
            restore_(W, file.product(layer))
            notes.errors.append(restored_within(largest, W))
            notes.digests[layer] = digest(tensor, EXACT)
        else:
            restore_(W, file.product(layer), kept.get(place.tensor, tuple(W.shape), integers_of(W.dtype)))

    if kept is not None and (heads := kept.manifest.untied.get(name)):
        other = Other(kept.header(name), dropped=heads)
    changes = {n: c for n, c in _changes(shard, places, change).items() if other is None or n not in other.dropped}
    hashes = rewrite(shard, folder / name, changes, digest=kept is not None, other=other)
    if kept is not None and (hashes.after, hashes.before) != tuple(kept.manifest.shards.get(name, ())):
        raise MergeError(_other_bytes(shard.path, hashes, kept.manifest.shards.get(name)))


def _others_than_base(folder: Path, merged: Path, shards: list[Shard]) -> set[str] | None:
    """Return the names in a folder that no unmerging of `merged` writes; None for a folder without such a base.

    What unmerging wrote has the base's bytes, and no note that tells who wrote it.
    """
    if (written := files_written(folder)) is not None:
        return {path.name for path in folder.iterdir()} - written
    try:
        tensors = _shapes(shards_of(folder))
    except FileError:
        return None
    if not tensors.items() <= _shapes(shards).items():
        return None
    beside = {model_folder.CONFIG, model_folder.GENERATION_CONFIG, INDEX, *model_folder.TOKENIZER_FILES}
    return {path.name for path in folder.iterdir()} - beside - {path.name for path in merged.iterdir()}


def _shapes(shards: list[Shard]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (entry.dtype, tuple(entry.shape)) for shard in shards for name, entry in shard.entries.items()}


def digest_of(file: LoRAFile) -> str:
    """Return the sha256 of an adapter's layers, scales, A and B: what decides ΔW, and nothing else of its files."""
    hashed = hashlib.sha256()
    for layer in sorted(file.factors):
        hashed.update(f"{layer} {file.scales[layer]!r}".encode())
        for factor in file.factors[layer]:
            hashed.update(f"{tuple(factor.shape)} {factor.dtype}".encode())
            hashed.update(bytes_of(factor))
    return hashed.hexdigest()


@contextmanager
def _correction(folder: Path, file: LoRAFile, reversible: bool) -> Iterator[correction.Writer | None]:
    """Open the correction file of a merge into `folder`; None for one that is not reversible."""
    if not reversible:
        yield None
        return
    with correction.writing(folder / correction.NAME, digest_of(file)) as writer:
        yield writer


def _changes(
    shard: Shard, places: Mapping[str, Place], change: Callable[[str, Tensor], None]
) -> dict[str, Callable[[Tensor], None]]:
    """Return tensor name → what changes it, of the layers whose weights are in this shard."""
    inside = {layer: p for layer, p in places.items() if p.tensor in shard.entries and p.untied is None}
    return {p.tensor: partial(change, layer) for layer, p in inside.items()}


def _copy_the_rest(source: Path, folder: Path) -> None:
    """Copy config, tokenizer and all other files that are no weights; not folders."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in _OTHER_WEIGHTS and path.name not in (correction.NAME, SIGNED):
            shutil.copyfile(path, folder / path.name)


def _other_bytes(path: Path, hashes: Rewritten, expected: tuple[str, str] | None) -> str:
    """Return the message for hashes that are not the correction's."""
    if expected is None:
        return f"{path} is not among the files that the correction belongs to: nothing was written."
    if hashes.before != expected[1]:
        return f"{path} has changed since it was merged: its hash differs. Nothing was written."
    return f"What came of {path} has another hash than the base's file had: nothing was written."
