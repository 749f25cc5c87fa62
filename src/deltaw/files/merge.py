"""Merge an adapter into a checkpoint on disk, and take it out again, one tensor in memory at a time. No model code: layers are
found by the names of their tensors.

The arithmetic is that of a merge in memory (layers/ops/merging.py), so the bits are too. With a correction file, what was
written can be turned back into the base's own bytes, which is checked by their hash.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from deltaw.errors import MergeError
from deltaw.files.formats import correction, model_folder, peft
from deltaw.files.formats.atomic import replacing_folder
from deltaw.files.formats.fingerprint import EXACT, Digest, bytes_of, combined, digest
from deltaw.files.formats.peft import LoRAFile
from deltaw.files.formats.peft_config import method_of
from deltaw.files.formats.safetensors import INDEX, Other, Rewritten, Shard, rewrite, shards_of, with_tensors
from deltaw.files.locate import NotByFiles, Place, check_by_files, hash_of_layers, places_of, stored_twice
from deltaw.layers.ops.merging import MergeStats, merge_, merge_reversibly_, restore_, restored_within
from deltaw.layers.ops.residual import integers_of
from deltaw.layers.ties import untied_config
from deltaw.model import inputs
from deltaw.model.merging.report import check_merged

# Weights in other formats than the one that is merged: stale beside it
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".safetensors"}


@dataclass(frozen=True)
class MergedFiles:
    """What `merge_files` did."""

    layers: dict[str, MergeStats]
    bytes: int
    """Of the weights that were written."""
    correction: int
    """Bytes of the correction file; 0 without one."""


@dataclass(frozen=True)
class UnmergedFiles:
    """What `unmerge_files` did."""

    layers: int
    corrected: bool
    """By a correction file."""
    exact: bool
    """Whether the base's own bits are back: by each file's sha256 with a correction, else by the fingerprint of the merged
    layers' weights that the adapter carries."""
    largest_error: float
    """Without a correction: how far an entry can be from the base's, at the most."""


def merge_files(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    reversible: bool = False,
    check_base: bool = True,
    untie: bool = False,
    look: Callable[[Path], None] = lambda folder: None,
) -> MergedFiles:
    """Write the checkpoint in folder `base` to folder `out` with the adapter's ΔW in it, in the dtypes that it is stored in;
    config and tokenizer go along, and the adapter's tokenizer or chat template in their place where its folder has another.
    At most one and a half times the largest tensor is held in memory.

    The tokens that the adapter was taught to end with are added to those that generation_config.json names.

    `reversible` writes a correction file too, with which `unmerge_files` gives the base's bytes back. With `untie` a head that
    shares the embedding's tensor gets one of its own, and the config says so. `look` is called with
    the finished folder before it takes `out`'s place. Raises FileError (NotByFiles where a merge in memory may still do),
    BaseMismatch (`check_base=False` overrides) or MergeError, with every problem, and what `look` raises; `out` is then as
    it was.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    shards, file = shards_of(base), _lora(adapter)
    check_by_files(file, undone=reversible)
    places, ends = places_of(shards, file, base, untie=untie), peft.ends_of(file, adapter)
    twice = stored_twice(shards, places, base)
    if twice and not untie:
        raise NotByFiles("The checkpoint has weights twice that its model ties, and one would change:", twice)
    if check_base:
        peft.check_base(file, adapter, peft.W0, partial(hash_of_layers, shards, places))
    brings_tokenizer = _brings_tokenizer(base, adapter, check_base)
    stats: dict[str, MergeStats] = {}

    def write(folder: Path, kept: correction.Writer | None) -> None:
        def change(layer: str, tensor: Tensor) -> None:
            place = places[layer]
            W0 = place.W0(tensor)
            if kept is None or place.untied is not None:
                stats[layer] = merge_(W0, file.change(layer))
            else:
                stats[layer], residual = merge_reversibly_(W0, file.product(layer))
                kept.put(place.tensor, residual)

        for shard in shards:
            name, other = shard.path.name, _with_heads(shard, places, change)
            done = rewrite(shard, folder / name, _changes(shard, places, change), digest=reversible, other=other)
            if kept is not None:
                kept.manifest.shards[name] = (done.before, done.after)
                if other is not None:
                    kept.keep_header(name, shard.header, other.added)

    with replacing_folder(out) as folder:
        with _correction(folder, file, reversible) as kept:
            write(folder, kept)
            check_merged(stats, allow_unchanged=False)
            _copy_the_rest(base, folder)
            before = _beside(folder)
            if brings_tokenizer:
                model_folder.replace_files(adapter, folder)
            if twice or any(place.untied for place in places.values()):
                _say_untied(folder, shards, places)
            model_folder.stop_at(folder, ends)
            if kept is not None:
                kept.keep(before, _beside(folder))
        look(folder)
    size = sum((out / shard.path.name).stat().st_size for shard in shards)
    path = out / correction.NAME
    return MergedFiles(stats, size, path.stat().st_size if reversible else 0)


def _brings_tokenizer(base: Path, adapter: Path, check: bool) -> bool:
    """Whether the adapter's folder has a tokenizer or a chat template that the base's has not. Raises NotByFiles where that has
    tokens which the checkpoint has no rows for."""
    if not model_folder.files_in(adapter):
        return False
    theirs = model_folder.open_tokenizer(base) if model_folder.files_in(base) else None
    own = model_folder.brought(adapter, theirs, check=check)
    if own is None:
        return False
    rows = _rows(base)
    if beyond := inputs.tokens_beyond(own, rows or 0):
        last = max(beyond.values())
        raise NotByFiles(
            f"The tokenizer in {adapter} has tokens up to {last}, the checkpoint rows for {rows}: by files alone none are added."
        )
    return True


def _rows(base: Path) -> int | None:
    """How many tokens the model in a folder has, by its config."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def _beside(folder: Path) -> dict[str, bytes]:
    """What a merge may replace beside the weights: name in the folder → content."""
    names = (name for name in ("config.json", model_folder.NAME, INDEX) if (folder / name).is_file())
    return {name: (folder / name).read_bytes() for name in names} | model_folder.contents(folder)


def _with_heads(shard: Shard, places: Mapping[str, Place], change: Callable[[str, Tensor], None]) -> Other | None:
    """How a merged file is another one where heads get tensors of their own; None where it is not."""
    added = {
        p.untied: (p.tensor, partial(change, n)) for n, p in places.items() if p.untied and p.tensor in shard.entries
    }
    if not added:
        return None
    return Other(with_tensors(shard, {name: origin for name, (origin, _) in added.items()}), added)


def _say_untied(folder: Path, shards: list[Shard], places: Mapping[str, Place]) -> None:
    """Write in a merged folder's config that the head has a tensor of its own, and into its index where that is."""
    path = folder / "config.json"
    config = untied_config(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (path := folder / INDEX).is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
        for place in places.values():
            shard = next(s for s in shards if place.tensor in s.entries)
            if place.untied:
                index["weight_map"][place.untied] = shard.path.name
                sizes = index.get("metadata", {})
                sizes |= (
                    {"total_size": sizes["total_size"] + shard.entries[place.tensor].size}
                    if "total_size" in sizes
                    else {}
                )
        path.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _lora(adapter: Path) -> LoRAFile:
    """Raises NotByFiles for an adapter of another method."""
    method = method_of(adapter)
    if method is not None:
        raise NotByFiles(
            f"{adapter} holds a {method} adapter: on disk LoRA's updates alone are merged, others in memory."
        )
    return peft.read(adapter, of_model=True)


def unmerge_files(merged: str | Path, adapter: str | Path, out: str | Path) -> UnmergedFiles:
    """Write the base of the merged checkpoint in folder `merged` to folder `out`.

    With the correction file of a reversible merge the files are the base's own, byte for byte, checked by their hash. Without
    one ΔW is subtracted, and the result says how far an entry can be from the base's; generation_config.json then stays as the
    merge left it. Raises FileError or MergeError: a
    checkpoint or an adapter that the correction does not belong to, a hash that differs; `out` is then not there.
    """
    merged, adapter, out = Path(merged), Path(adapter), Path(out)
    shards, file = shards_of(merged), _lora(adapter)
    check_by_files(file, undone=True)
    places = places_of(shards, file, merged)
    kept = correction.Reader(merged / correction.NAME) if (merged / correction.NAME).is_file() else None
    if kept is not None and kept.manifest.adapter != digest_of(file):
        raise MergeError(
            f"The adapter in {adapter} is not the one that was merged into {merged}: its A, B or scales differ."
        )
    errors = [0.0]
    digests: dict[str, Digest] = {}

    def change(layer: str, tensor: Tensor) -> None:
        place = places[layer]
        W = place.W0(tensor)
        if kept is None:
            largest = W.abs().max()
            restore_(W, file.product(layer))
            errors.append(restored_within(largest, W))
            digests[layer] = digest(tensor, EXACT)
        else:
            restore_(W, file.product(layer), kept.get(place.tensor, tuple(W.shape), integers_of(W.dtype)))

    with replacing_folder(out) as folder:
        for shard in shards:
            name, other = shard.path.name, None
            if kept is not None and (heads := kept.manifest.untied.get(name)):
                other = Other(kept.header(name), dropped=heads)
            changes = {
                n: c for n, c in _changes(shard, places, change).items() if other is None or n not in other.dropped
            }
            done = rewrite(shard, folder / name, changes, digest=kept is not None, other=other)
            if kept is not None and (done.after, done.before) != tuple(kept.manifest.shards.get(name, ())):
                raise MergeError(_other_bytes(shard.path, done, kept.manifest.shards.get(name)))
        _copy_the_rest(merged, folder)
        if kept is not None:
            kept.put_back(folder)
    expected = peft.fingerprint_of(file, adapter, peft.W0)
    same = expected is not None and expected.exact == combined(digests[layer] for layer in sorted(digests))
    return UnmergedFiles(len(places), kept is not None, kept is not None or same, max(errors))


def digest_of(file: LoRAFile) -> str:
    """sha256 of an adapter's layers, scales, A and B: what decides ΔW, and nothing else of its files."""
    found = hashlib.sha256()
    for layer in sorted(file.factors):
        found.update(f"{layer} {file.scales[layer]!r}".encode())
        for factor in file.factors[layer]:
            found.update(f"{tuple(factor.shape)} {factor.dtype}".encode())
            found.update(bytes_of(factor))
    return found.hexdigest()


@contextmanager
def _correction(folder: Path, file: LoRAFile, reversible: bool) -> Iterator[correction.Writer | None]:
    if not reversible:
        yield None
        return
    with correction.writing(folder / correction.NAME, digest_of(file)) as writer:
        yield writer


def _changes(
    shard: Shard, places: Mapping[str, Place], change: Callable[[str, Tensor], None]
) -> dict[str, Callable[[Tensor], None]]:
    """Tensor name → what changes it, of the layers whose weights are in this shard."""
    inside = {layer: p for layer, p in places.items() if p.tensor in shard.entries and p.untied is None}
    return {p.tensor: partial(change, layer) for layer, p in inside.items()}


def _copy_the_rest(source: Path, folder: Path) -> None:
    """Config, tokenizer and whatever else is no weights: of the files that are there, not of folders."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in _OTHER_WEIGHTS and path.name != correction.NAME:
            shutil.copyfile(path, folder / path.name)


def _other_bytes(path: Path, done: Rewritten, expected: tuple[str, str] | None) -> str:
    if expected is None:
        return f"{path} is not among the files that the correction belongs to: nothing was written."
    if done.before != expected[1]:
        return f"{path} has changed since it was merged: its hash differs. Nothing was written."
    return f"What came of {path} has another hash than the base's file had: nothing was written."
