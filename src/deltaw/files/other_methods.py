"""Adapters of methods other than LoRA ↔ what their files hold. Reads the model, changes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw import __version__
from deltaw.config import from_mapping, to_mapping
from deltaw.errors import AdapterError, DeltaWError, FileError, nearest
from deltaw.files.formats.method_file import (
    DIFFERENCES,
    PROMPT,
    REPLACED,
    MethodFile,
    as_difference,
    from_difference,
    is_beside,
    problems_with,
)
from deltaw.files.formats.peft.card import base_name, public_name
from deltaw.files.formats.peft.config import METHOD, WRITTEN_AS, PeftConfig
from deltaw.files.formats.peft.metadata import BASE, BASE_PLACE, FORMAT, FORMAT_KEY, VERSION_KEY
from deltaw.files.identity import base_fingerprint
from deltaw.layers.kinds import Conv1DKind, kind_of
from deltaw.layers.tree import base_modules, dotted, owner_of
from deltaw.methods.full import Full
from deltaw.methods.plan import Method
from deltaw.methods.registry import method_class, name_of
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.ia3 import Scaled
from deltaw.methods.updates.prefix import Prepended
from deltaw.methods.whole import inside
from deltaw.model.merging.kept import base_tensors
from deltaw.model.record import readers, record_of
from deltaw.model.summary import updates as updates_of


def as_method_file(model: nn.Module, name: str) -> MethodFile:
    """Return adapter `name` as a file: PEFT's, where PEFT has one for all that it trains.

    Raises:
        AdapterError: for a method that is not one of deltaw's.
    """
    method = record_of(model).attached[name].method
    method_name = name_of(method)
    if method_name is None:
        raise AdapterError(f"{type(method).__name__} has no file format: it is none of deltaw's methods.")
    updates = updates_of(model, name)
    tensors: dict[str, Tensor] = dict(tensors_in(updates))
    differences = _as_differences(model, tensors, method) if isinstance(method, Full) else set()
    replaced = _replaced(updates) - _all_names(model, differences)
    metadata = {
        FORMAT_KEY: FORMAT,
        VERSION_KEY: __version__,
        REPLACED: json.dumps(sorted(replaced)),
        DIFFERENCES: json.dumps(sorted(differences)),
        **place_of_base(model),
    }
    known = record_of(model).attached[name].metadata.get("of_base")
    fingerprint = base_fingerprint(model, without=replaced) if known is None else known.get(BASE)
    if fingerprint is not None:
        metadata[BASE] = str(fingerprint)
    base, settings = name_of_base(model), to_mapping(method)
    config = PeftConfig.of({METHOD: method_name, "settings": settings, "base_model_name_or_path": base})
    file = MethodFile(method_name, settings, tensors, config, metadata)
    return _as_ia3(model, file, updates, base) or _as_prompt(model, file, updates, base) or file


def name_of_base(model: nn.Module) -> str | None:
    """Return the base's id on the hub, or its folder's own name, where it was opened by one."""
    return public_name(_opened_by(model))


def place_of_base(model: nn.Module) -> dict[str, str]:
    """Return what the metadata says of where the base lies: its path as it was opened by, where it is a folder here.

    It is not made absolute: an adapter's bytes do not depend on the place where it is saved.
    """
    name = _opened_by(model)
    local = name is not None and base_name(name) == name and Path(name).is_dir()
    return {BASE_PLACE: name} if name and local else {}


def _opened_by(model: nn.Module) -> str | None:
    name = getattr(getattr(owner_of(model), "config", None), "_name_or_path", None)
    return str(name) if name else None


def _replaced(updates: Mapping[str, Update]) -> set[str]:
    """Return the names of the base's parameters that the adapter has values for."""
    return {dotted(n, parameter) for n, u in updates.items() for parameter in u.replaced()}


def tensors_in(updates: Mapping[str, Update]) -> dict[str, nn.Parameter]:
    """Return dotted name → parameter; one that updates share stands by its first name."""
    seen: dict[int, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    for name, update in updates.items():
        for own_name, parameter in update.named_parameters():
            if seen.setdefault(id(parameter), dotted(name, own_name)) == dotted(name, own_name):
                parameters[dotted(name, own_name)] = parameter
    return parameters


# --- values as differences from the base ------------------------------------------------------------------------


def _as_differences(model: nn.Module, tensors: dict[str, Tensor], method: Full) -> set[str]:
    """Put differences from the base in place of tensors, except of the modules that are kept whole; return their names."""
    if method.kept != "difference":
        return set()
    whole = inside(dict(base_modules(model)), method.whole)
    pairs = [pair for pair in _with_base(model, tensors) if pair[0].rpartition(".")[0] not in whole]
    for name, W, before in pairs:
        tensors |= as_difference(name, W.detach(), before)
    return {name for name, _, _ in pairs}


def _with_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, tensor, and the base's tensor that goes by that name among others, of those that there are."""
    names = readers(model)
    base = {n: tensor.detach() for _, parameter, tensor in base_tensors(model) for n in names[parameter]}
    return ((name, tensor, base[name]) for name, tensor in tensors.items() if name in base)


def _all_names(model: nn.Module, some: Iterable[str]) -> set[str]:
    """Return all names of the base's parameters of which these are one each."""
    wanted = set(some)
    return {n for names in readers(model).values() if wanted.intersection(names) for n in names}


# --- PEFT's forms -----------------------------------------------------------------------------------------------


def _as_ia3(model: nn.Module, file: MethodFile, updates: Mapping[str, Update], base: str | None) -> MethodFile | None:
    """Return the file as PEFT has (IA)³: whole modules beside it, which share nothing. None where it is another."""
    scaled = {n: u for n, u in updates.items() if isinstance(u, Scaled)}
    others = {n: u for n, u in updates.items() if n not in scaled}
    owner = owner_of(model)
    tied = {n for names in readers(model).values() if len(names) > 1 for n in names}
    if not scaled or not all(u.covers(owner.get_submodule(n)) for n, u in others.items()) or tied & _replaced(others):
        return None
    inputs = frozenset(n for n, u in scaled.items() if u.inputs)
    transposed = all(isinstance(kind_of(owner.get_submodule(n)), Conv1DKind) for n in scaled)
    config = PeftConfig.of({
        "peft_type": "IA3", "task_type": None, "peft_version": WRITTEN_AS, "base_model_name_or_path": base,
        "target_modules": sorted(scaled),
        "feedforward_modules": sorted(inputs), "fan_in_fan_out": transposed, "modules_to_save": sorted(others) or None,
        "init_ia3_weights": True, "inference_mode": True,
    })  # fmt: skip
    tensors = file.tensors | {f"{n}.l": u.whole(owner.get_submodule(n)) for n, u in scaled.items()}
    return dataclasses.replace(file, config=config, tensors=tensors, inputs=inputs)


def _as_prompt(
    model: nn.Module, file: MethodFile, updates: Mapping[str, Update], base: str | None
) -> MethodFile | None:
    """Return the file as PEFT has prompt tuning of a decoder: the prompt, and nothing else. None where it is another."""
    (update,), owner = (*updates.values(),) if len(updates) == 1 else (None,), owner_of(model)
    config = getattr(owner, "config", None)
    generates = getattr(owner, "can_generate", lambda: False)() and not getattr(config, "is_encoder_decoder", False)
    if not isinstance(update, Prepended) or not generates:
        return None
    length, d = update.rows.shape
    settings = PeftConfig.of({
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "peft_version": WRITTEN_AS, "base_model_name_or_path": base,
        "num_virtual_tokens": length,
        "token_dim": d, "num_transformer_submodules": 1, "num_attention_heads": getattr(config, "num_attention_heads", None) or 1,
        "num_layers": getattr(config, "num_hidden_layers", None) or 1, "prompt_tuning_init": "RANDOM", "inference_mode": True,
    })  # fmt: skip
    return dataclasses.replace(file, config=settings, tensors={PROMPT: update.rows})


# --- a file as updates ------------------------------------------------------------------------------------------


def method_in(file: MethodFile, path: Path) -> Method:
    """Return the method with the file's settings. Raises FileError where these are none of the method's."""
    try:
        return from_mapping(method_class(file.method), file.settings, where=str(path))
    except DeltaWError as error:
        raise FileError(f"The adapter in {path} cannot be used by this version of deltaw: {error}") from error


def restored(
    model: nn.Module, file: MethodFile, path: Path, *, device: torch.device | None = None
) -> dict[str, Update]:
    """Return the updates that the file's settings plan on this model, with the file's values.

    Args:
        model: the base.
        file: the adapter, by the model's names.
        path: its folder, for messages.
        device: where the updates are kept (default: the layers').

    Raises:
        FileError: with every tensor that is missing, unexpected or of another shape.
    """
    misfit = f"The adapter in {path} does not fit this model; nothing was changed:"
    method = method_in(file, path)
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced
            updates = dict(method.plan(owner_of(model)).updates)
    except DeltaWError as error:
        raise FileError(f"{misfit}\n{error}") from error
    planned = tensors_in(updates)
    values, differences = _by_this_models_names(file, updates), file.differences()
    beside = {n for n in values if is_beside(n) and n.rpartition(":")[0] in differences}
    problems = [f"{n} is missing" for n in planned if n not in values]
    problems += [
        f"{n} is unexpected{nearest(n, planned, count=1)}" for n in values if n not in planned and n not in beside
    ]
    problems += [
        f"{n} is {list(values[n].shape)}, the model needs {list(t.shape)}"
        for n, t in planned.items()
        if n in values and values[n].shape != t.shape
    ]
    problems += problems_with({n: t for n, t in values.items() if n in differences | beside})
    if problems:
        raise FileError(misfit, problems)
    values |= {n: from_difference(n, values, W0) for n, _, W0 in _with_base(model, values) if n in differences}
    whole = {id(p) for u in updates.values() for p in u.replaced().values()}
    named = {n: p for p, names in readers(model).items() for n in names}
    for name, parameter in planned.items():
        value = values[name]
        if id(parameter) in whole and name in named:  # what stands in a base's place has its precision
            value = value.to(named[name].dtype)
        parameter.data = value.to(parameter.device if device is None else device)
    return updates


def _by_this_models_names(file: MethodFile, updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Return the file's tensors by their names on this model.

    A prompt goes to the body, whatever that is called. An update of a slice gets its own entries of a layer's vector.
    """
    values = dict(file.tensors)
    body = next((n for n, u in updates.items() if isinstance(u, Prepended)), None)
    if PROMPT in values and body is not None:
        values[dotted(body, "rows")] = values.pop(PROMPT)
    for name, update in updates.items():
        key = dotted(name, "l")
        if isinstance(update, Scaled) and update.rows is not None and key in values:
            whole, rows = values[key], update.rows.cpu()
            if len(whole) > int(rows.max()):
                values[key] = whole[rows]
    return values
