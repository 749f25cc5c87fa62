"""An attached adapter ↔ its folder: saved with all that PEFT or deltaw need of it, loaded and checked before a model changes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaw.errors import FileError, shown
from deltaw.files import units
from deltaw.files.formats import method_file, peft
from deltaw.files.formats.atomic import check_apart
from deltaw.files.formats.method_file import MethodFile
from deltaw.files.formats.model_folder import copy_files, differs, files_in, has_vocabulary
from deltaw.files.formats.peft import LoRAFile
from deltaw.files.formats.peft.metadata import REFUSED, TRAINING
from deltaw.files.formats.peft.targets import saved_module
from deltaw.files.formats.strict_json import parse_object
from deltaw.files.identity import base_hash
from deltaw.files.other_methods import as_method_file, method_in, restored
from deltaw.files.pack import as_file
from deltaw.files.renames import (
    as_meant,
    plainly_named,
    plainly_named_method,
    refused_by_peft,
    renamed,
    renamed_method,
    stacked,
    unlike_in_peft,
    without_effect_in_peft,
)
from deltaw.files.unpack import fitted, vocabulary
from deltaw.layers import tree
from deltaw.layers.ops.merging import delta_norm
from deltaw.layers.processes.ranks import ALONE
from deltaw.layers.processes.shards import ranks_of, whole
from deltaw.layers.source import never_called
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA
from deltaw.methods.plan import Plan
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.lowrank import low_rank_parts
from deltaw.model import attach, summary
from deltaw.model import record as live
from deltaw.model.ends import say_without_generate, taught, teach
from deltaw.model.inputs import vocabulary_size

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase | BaseImageProcessor

STEPS_TAKEN = "steps_taken"
"""Among the settings of a training: how many steps the adapter has behind it."""


log = logging.getLogger("deltaw")

# A file that is smaller than this, in bytes, needs no explanation
_SMALL = 10_000_000


# --- saving -----------------------------------------------------------------------------------------------------


def save(
    model: nn.Module, path: str | Path, *, name: str = "default", training: Mapping[str, object] | None = None,
    tokenizer: Tokenizer | None = None, ends: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """Write an adapter as a PEFT-format folder, atomically, and read it back.

    Where modules that are trained whole make up most of a large file, that is logged. README.md is the card that the hub shows;
    one that somebody has edited stays.

    Args:
        model: a model with the adapter; it stays as it is. While it is merged, A and B are written all the same.
        path: the folder; an adapter that was there is replaced, and what else is beside it there stays.
        name: the adapter's.
        training: how it was trained, kept in the file's metadata (default: what the adapter was loaded with).
        tokenizer: goes into the folder if it has other tokens or another chat template than the base's. PEFT's users and the
            commands look for it there. Default: the one in the folder that the adapter was loaded from.
        ends: ids of the tokens that end what it was taught to say, at which generation and merged models stop. Default: those
            that are known of it.

    Returns:
        The folder.

    Raises:
        AdapterError: for an unknown name, and for updates that PEFT's format has no place for.
        ConfigError: for a path that is, holds or lies in the base's folder, and for a folder with other things and no adapter.
        FileError: when a value is not finite, A is all zero, the file reads back differently, or it cannot be written. What was
            at `path` is then still there.

    >>> from transformers import AutoModelForCausalLM
    >>> import deltaw
    >>> model = AutoModelForCausalLM.from_pretrained("model")
    >>> folder = deltaw.save(deltaw.attach(model, deltaw.LoRA(rank=4)), "saved")
    >>> sorted(path.name for path in folder.iterdir())
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    record = live.record_of(model)
    adapter = record.attached[live.known(record, name)]
    ranks = ALONE if "of_base" in adapter.metadata else ranks_of(model)
    check_apart(path, {"the model's own weights": _source_of(model)})
    peft.check_adapter_place(Path(path))
    training = adapter.metadata.get("training") if training is None else training
    kept = {TRAINING: json.dumps(dict(training), sort_keys=True, ensure_ascii=False)} if training else {}
    if ends is not None:
        teach(model, name, ends)
    if known := taught(model, [name]):
        kept[peft.ENDS] = json.dumps(known)
    beside = _tokenizer_writer(model, adapter, tokenizer)
    with whole(model, lambda: summary.parameters(model, name)):
        _check_whole(model, name)
        if isinstance(adapter.method, LoRA):
            file = plainly_named(as_file(model, name))
            return ranks.by_first(lambda: _written(model, Path(path), file, kept, beside))
        other = plainly_named_method(as_method_file(model, name))
        other.metadata.update(kept)
        return ranks.by_first(lambda: method_file.write(Path(path), other, beside))


def remember_base(model: nn.Module, name: str) -> None:
    """Take what an adapter's file says of its base, while the base is whole: `save` will not read the base again.

    A training calls it before it deals the frozen base out. Each process can then save by itself, also when another is gone.
    """
    adapter = live.record_of(model).attached[name]
    file = as_file(model, name) if isinstance(adapter.method, LoRA) else as_method_file(model, name)
    adapter.metadata["of_base"] = dict(file.metadata)


def _check_whole(model: nn.Module, name: str) -> None:
    """Raise FileError for an adapter that is not whole in this process, as engines leave it that deal weights out."""
    lacking = [
        f"{layer}: {tensor}"
        for layer, update in summary.updates(model, name).items()
        for tensor, values in update.named_parameters()
        if not values.numel() or values.is_meta
    ]
    if lacking:
        raise FileError(
            "Not saved: this process does not hold the adapter whole. Some of its tensors have no values here:",
            lacking,
            "Save within the block by which the engine gathers weights (FullyShardedDataParallel.summon_full_params, "
            "deepspeed.zero.GatheredParameters), or train with torch's fully_shard, from which save gathers by itself.",
        )


def _written(
    model: nn.Module, path: Path, file: LoRAFile, kept: Mapping[str, str], beside: Callable[[Path], None]
) -> Path:
    """Write the file of a LoRA adapter, and log what other programs do not take as it is."""
    dead = [
        layer for layer, (A, B) in file.factors.items() if not A.any() and not (layer in file.embeddings and B.any())
    ]
    if dead:
        raise FileError("Not saved: A is all zero, so nothing could be learned, in", dead)
    if refused := _say_what_peft_refuses(model, file):
        kept = {**kept, REFUSED: json.dumps(refused)}
    file.metadata.update(kept)
    _say_what_peft_computes_otherwise(file, dict(tree.base_modules(model)))
    written = peft.write(path, file, beside)
    _say_what_is_large(written, file)
    return written


def _say_what_peft_refuses(model: nn.Module, file: LoRAFile) -> dict[str, list[str]]:
    """Log why PEFT does not load an adapter, once a reason; return reason → layers."""
    refused = refused_by_peft(model, dict(tree.base_modules(model)), file)
    for why, names in refused.items():
        log.warning(
            "PEFT (0.21) will refuse this adapter: %s (%d: %s). deltaw loads and merges it. For PEFT, train other targets.",
            why, len(names), shown(names),
        )  # fmt: skip
    return refused


def _say_what_peft_computes_otherwise(file: LoRAFile, layers: Mapping[str, nn.Module]) -> None:
    """Log the updates that do something else in PEFT, or nothing."""
    for layer, others in tree.names_of(layers).items():
        if layer in file.factors:
            log.warning(
                "%s is one module (%s): PEFT adapts the calls by its first name alone, deltaw all.",
                layer, ", ".join(others),
            )  # fmt: skip
    if dead := [layer for layer in file.factors if without_effect_in_peft(layer, layers)]:
        log.warning(
            "PEFT does not compute with the updates of %s, which the modules around them only read; deltaw does.",
            shown(dead),
        )
    for layer in file.factors:
        if layer in layers and (why := unlike_in_peft(layers[layer])):
            log.warning("%s is a convolution %s; deltaw has it there.", layer, why)


def _tokenizer_writer(model: nn.Module, adapter: live.Attached, tokenizer: Tokenizer | None) -> Callable[[Path], None]:
    """Return what puts a tokenizer into a new adapter folder, where there is one that is not the base's."""
    origin = adapter.metadata.get("tokenizer") if tokenizer is None else None
    source = _source_of(model)

    def write(folder: Path) -> None:
        if origin is not None and not files_in(origin):
            log.warning("The tokenizer in %s is no longer there: %s is saved without one.", origin, folder.name)
        elif origin is not None and differs(origin, source):
            copy_files(origin, folder)
        elif tokenizer is not None and has_vocabulary(tokenizer) and differs(tokenizer, source):
            tokenizer.save_pretrained(folder)

    return write


def _source_of(model: nn.Module) -> str | None:
    """Return the folder or hub id that transformers opened the base from; None where it does not say."""
    return getattr(getattr(tree.owner_of(model), "config", None), "_name_or_path", None)


def _say_what_is_large(path: Path, file: LoRAFile) -> None:
    """Log where most of a large file is modules that are trained whole."""
    whole = {name: value.numel() * value.element_size() for name, value in file.whole.items()}
    size = (path / peft.WEIGHTS).stat().st_size
    if size > _SMALL and sum(whole.values()) > size / 2:
        largest = max(whole, key=lambda name: whole[name])
        log.warning(
            "%s of the adapter's %s are parameters that are trained whole, most of all %s. Where only some tokens' rows matter, "
            "tokens (command line: --tokens) in place of whole trains and stores those alone.",
            units.size(sum(whole.values())), units.size(size), largest,
        )  # fmt: skip


# --- loading ----------------------------------------------------------------------------------------------------


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    activate: bool = True,
    check_base: bool = True,
    dtype: torch.dtype | None = None,
    host: bool = False,
) -> str:
    """Attach the adapter in a folder, not trainable, and make it active.

    Everything is checked before the model is touched. A file without a fingerprint (not ours) is logged.

    Args:
        model: the base, with or without adapters.
        path: an adapter folder, deltaw's or PEFT's.
        name: the adapter's name here (default: "default", or the folder's name where that is taken).
        activate: make it the active adapter.
        check_base: refuse an adapter of other base weights.
        dtype: precision of A and B instead of the file's, for example bfloat16 in half the bytes. What it costs is in
            `summary(model).adapters[name].rounding`. Modules that the adapter has whole are kept in the base's dtype.
        host: keep the adapter in host memory; it goes to its layers' device when it is used (`keep_on_device` limits how many
            are there).

    Returns:
        The adapter's name.

    Raises:
        FileError: with all problems of the file, layers that the model lacks (with the nearest names) and shapes that differ.
        BaseMismatch: when the file says that it belongs to other base weights.
        AdapterError: for a name that is taken.

    >>> from transformers import AutoModelForCausalLM
    >>> import deltaw
    >>> model = AutoModelForCausalLM.from_pretrained("model")
    >>> folder = deltaw.save(deltaw.attach(model, deltaw.LoRA(rank=4)), "to-load")
    >>> deltaw.load(AutoModelForCausalLM.from_pretrained("model"), folder, name="mine")
    'mine'
    """
    path = Path(path)
    return place(model, read(path), path, name=name, activate=activate, check_base=check_base, dtype=dtype, host=host)


def place(
    model: nn.Module, file: LoRAFile | MethodFile, path: Path, *, name: str | None = None, activate: bool = True,
    check_base: bool = True, dtype: torch.dtype | None = None, host: bool = False,
) -> str:  # fmt: skip
    """Do as `load` with what was read from `path` before."""
    layers = dict(tree.base_modules(model))
    file = named_for(model, file)
    taken = summary.adapters(model)
    if name is None:
        name = "default" if "default" not in taken else path.name.replace(".", "_")
    live.check_free(model, name)
    if check_base:
        hash_of, base = partial(base_hash, model, without=file.replaced()), file.config.base
        peft.check_base(file.metadata, path, peft.BASE, hash_of, base)
    device = torch.device("cpu") if host else None
    if isinstance(file, LoRAFile):
        _check_names(file, layers, path)
        updates = fitted(model, layers, file, path, device=device)
    else:
        updates = restored(model, file, path, device=device)
    training = _training(file, path)
    _check_effect(file, updates, training, path)
    if isinstance(file, LoRAFile):
        _say_what_has_no_effect(file, layers, path)
    method = _lora(file) if isinstance(file, LoRAFile) else method_in(file, path)
    metadata: live.Notes = {"training": training} if training else {}
    if files_in(path):
        metadata["tokenizer"] = path
    if dtype is not None:
        metadata["rounding"] = _stored_as(updates, dtype)
    ends = peft.ends_of(file.metadata, path)
    attach.apply_plan(model, Plan(updates, layers=layers), method, name=name, activate=False, metadata=metadata)
    teach(model, name, ends)
    say_without_generate(model, ends)
    record = live.record_of(model)
    if host:
        record.residency.keep(name, _devices(model, updates))
    if activate:
        live.bring(record, [name])
        record.route.choose(name)
    return name


def named_for(model: nn.Module, file: LoRAFile | MethodFile) -> LoRAFile | MethodFile:
    """Return an adapter's file by this model's names, without the layers that PEFT has no modules for on this model.

    Both are logged. Raises FileError for names that become one, and where no layer is left.
    """
    known = dict(tree.base_modules(model))
    if isinstance(file, LoRAFile):
        return as_meant(model, known, renamed(stacked(file, known), known))
    return renamed_method(file, known)


def tokens_with(model: nn.Module, file: LoRAFile | MethodFile) -> int:
    """Return how many tokens the model has rows for with this adapter, whose names are the model's."""
    if isinstance(file, LoRAFile):
        return vocabulary(model, file)
    return vocabulary_size(model) or 0


def _check_names(file: LoRAFile, layers: Mapping[str, nn.Module], path: Path) -> None:
    """Raise FileError where PEFT adapts some calls of a module and deltaw would adapt all. A file of deltaw means all."""
    if file.ours:
        return
    saved = [name.rpartition(".")[0] for name in file.whole if saved_module(name, file.config)]
    named = {*file.factors, *saved}
    problems = [
        f"{name!r} is one module under the names {', '.join(others)}: PEFT adapts the calls by the first name alone, deltaw all "
        f"calls. Make {others[-1]!r} a module of its own with the same weight (copy.deepcopy, then assign the weight)"
        for name, others in tree.names_of(layers).items()
        if name in named
    ]
    if problems:
        raise FileError(f"The adapter in {path} means another model than this; nothing was changed:", problems)


def _check_effect(
    file: LoRAFile | MethodFile, updates: Mapping[str, Update], training: Mapping[str, Any], path: Path
) -> None:
    """Raise FileError for an adapter of which nothing is put on the model, and for one whose steps have changed nothing.

    Before the first step of a training B is zero; such an adapter is loaded, which is logged.
    """
    if not updates:
        raise FileError(
            f"The adapter in {path} has no effect on this model: nothing in it is of one of the model's layers."
        )
    steps = training.get(STEPS_TAKEN)
    if isinstance(file, LoRAFile) and not file.changes_anything and isinstance(steps, int) and steps > 0:
        raise FileError(
            f"The adapter in {path} has no effect: its file says that {steps} steps were taken, and B is zero in all of its "
            f"{len(file.factors)} layers. Its values were lost; train again, or use another copy."
        )


def _say_what_has_no_effect(file: LoRAFile, layers: Mapping[str, nn.Module], path: Path) -> None:
    """Log an adapter that changes nothing, and updates on modules that no forward calls."""
    if not file.changes_anything:
        log.warning(
            "The adapter in %s changes nothing: B is zero in all of its %d layers, as before the first step of a training.",
            path, len(file.factors),
        )  # fmt: skip
    if silent := never_called(layers).intersection(file.factors):
        log.warning(
            "The adapter in %s has updates that change no output, since no forward calls their modules: %s.",
            path, ", ".join(sorted(silent)[:5]),
        )  # fmt: skip


def read(path: Path) -> LoRAFile | MethodFile:
    """Read an adapter folder of any method. Raises FileError with every problem of the file itself."""
    return peft.read(path, of_model=True) if peft.method_of(path) is None else method_file.read(path)


def _devices(model: nn.Module, updates: Mapping[str, Update]) -> Iterator[tuple[nn.Parameter, torch.device]]:
    """Yield each parameter of the updates, and the device that it is used on."""
    owner = tree.owner_of(model)
    for name, update in updates.items():
        device = next(owner.get_submodule(name).parameters()).device
        for parameter in update.parameters():
            yield parameter, device


def training_of(path: str | Path) -> dict[str, Any]:
    """Return what the adapter's file says about how it was trained (prompt template, data form …); empty for foreign files.

    Raises FileError for a file that cannot be read.
    """
    return _training(read(Path(path)), Path(path))


def _training(file: LoRAFile | MethodFile, path: Path) -> dict[str, Any]:
    try:
        return parse_object(file.metadata.get(TRAINING, "{}"))
    except ValueError as error:
        raise FileError(
            f"{path}: the training settings in the metadata of {peft.WEIGHTS} are damaged: {error}"
        ) from error


def _stored_as(updates: Mapping[str, Update], dtype: torch.dtype) -> float:
    """Give A and B this dtype. Return ‖ΔW − ΔW'‖ / ‖ΔW‖ over all layers together."""
    error = total = 0.0
    for update in low_rank_parts(updates):
        A, B = update.A.detach(), update.B.detach()
        update.keep_in(dtype)
        stored = update.A.detach(), update.B.detach()
        both = torch.cat([A.double(), stored[0].double()], dim=-2), torch.cat([B.double(), -stored[1].double()], dim=-1)
        error += delta_norm(*both, update.scale) ** 2
        total += delta_norm(A, B, update.scale) ** 2
    return (error / total) ** 0.5 if total else 0.0


def _lora(file: LoRAFile) -> LoRA:
    """Return the settings that a file was made with, as far as it says them."""
    config = file.config
    method = LoRA(
        rank=config.r,
        alpha=config.lora_alpha,
        targets={layer: file.rank(layer) for layer in file.factors},
        dropout=config.lora_dropout,
        scaling="alpha/sqrt(r)" if config.use_rslora else "alpha/r",
        whole=sorted({name.rsplit(".", 1)[0] for name in file.whole}),
        tokens=sorted({int(i) for indices, _ in file.rows.values() for i in indices}),
    )
    return DoRA(**vars(method)) if file.magnitudes else method
