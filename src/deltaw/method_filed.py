"""An attached adapter of any method but LoRA as what its file holds, and a file as updates of one model. Reads the model, changes
nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.base_identity import base_fingerprint
from deltaw.config import from_mapping, to_mapping
from deltaw.differences import as_difference, from_difference, is_beside, problems_with
from deltaw.errors import AdapterError, DeltaWError, FileError, listing, nearest
from deltaw.files.method_file import DIFFERENCES, PROMPT, REPLACED, MethodFile
from deltaw.files.peft import BASE, FORMAT
from deltaw.files.peft_config import METHOD
from deltaw.layers import tree
from deltaw.layers.kinds import Conv1DKind, kind_of
from deltaw.layers.tree import dotted, owner_of
from deltaw.methods.full import Full
from deltaw.methods.registry import method_class, name_of
from deltaw.methods.updates.base import Update
from deltaw.methods.updates.ia3 import Scaled
from deltaw.methods.updates.prefix import Prepended
from deltaw.methods.updates.whole import Replaced, ReplacedRows
from deltaw.methods.whole import inside
from deltaw.model import record, summary
from deltaw.model.record import readers
from deltaw.version import __version__


def as_method_file(model: nn.Module, name: str) -> MethodFile:
    """Adapter `name` as a file: PEFT's, where PEFT has one for all that it trains. Raises AdapterError for a method that is not
    one of deltaw's."""
    method = record.record_of(model).attached[name].method
    known = name_of(method)
    if known is None:
        raise AdapterError(f"{type(method).__name__} has no file format: it is none of deltaw's methods.")
    updates = summary.updates(model, name)
    tensors = _tensors(updates)
    differences = _as_differences(model, tensors, method) if isinstance(method, Full) else set()
    replaced = _replaced(updates) - _all_names(model, differences)
    metadata = {
        "deltaw_format": FORMAT,
        "deltaw_version": __version__,
        REPLACED: json.dumps(sorted(replaced)),
        DIFFERENCES: json.dumps(sorted(differences)),
    }
    if (base_is := base_fingerprint(model, without=replaced)) is not None:
        metadata[BASE] = str(base_is)
    file = MethodFile(known, to_mapping(method), tensors, {}, metadata)
    base = getattr(getattr(owner_of(model), "config", None), "_name_or_path", None) or None
    made = _as_ia3(model, file, updates, base) or _as_prompt(model, file, updates, base)
    return made or _with(file, {METHOD: known, "settings": file.settings, "base_model_name_or_path": base})


def _with(file: MethodFile, config: dict[str, Any], **others: Any) -> MethodFile:
    return MethodFile(**{**vars(file), "config": config, **others})


def _replaced(updates: Mapping[str, Update]) -> set[str]:
    """The base's parameters that the adapter has values for."""
    found = {dotted(n, own) for n, u in updates.items() if isinstance(u, Replaced) for own in u._parameters}
    return found | {dotted(n, "weight") for n, u in updates.items() if isinstance(u, ReplacedRows)}


def _tensors(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Dotted name → parameter, one that updates share by its first name."""
    seen: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    for name, update in updates.items():
        for own, parameter in update.named_parameters():
            if seen.setdefault(id(parameter), dotted(name, own)) == dotted(name, own):
                found[dotted(name, own)] = parameter
    return found


def _as_differences(model: nn.Module, tensors: dict[str, Tensor], method: Full) -> set[str]:
    """Puts differences from the base into the place of tensors, except of the modules that are kept whole; their names."""
    if method.kept != "difference":
        return set()
    whole = inside(dict(tree.base_modules(model)), method.whole)
    pairs = [pair for pair in _with_base(model, tensors) if pair[0].rpartition(".")[0] not in whole]
    for name, W, W0 in pairs:
        tensors |= as_difference(name, W.detach(), W0)
    return {name for name, _, _ in pairs}


def _with_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, tensor, the base's under any of whose names it is)."""
    names = readers(model)
    base = {n: tensor.detach() for _, parameter, tensor in record.base_tensors(model) for n in names[parameter]}
    return ((name, tensor, base[name]) for name, tensor in tensors.items() if name in base)


def _all_names(model: nn.Module, some: Iterable[str]) -> set[str]:
    """The names of the base's parameters of which these are one each."""
    wanted = set(some)
    return {n for names in readers(model).values() if wanted.intersection(names) for n in names}


# --- PEFT's forms -----------------------------------------------------------------------------------------------


def _as_ia3(model: nn.Module, file: MethodFile, updates: Mapping[str, Update], base: str | None) -> MethodFile | None:
    """As PEFT has (IA)³: whole modules beside it, which share nothing."""
    scaled = {n: u for n, u in updates.items() if isinstance(u, Scaled)}
    others = {n: u for n, u in updates.items() if n not in scaled}
    owner = owner_of(model)
    tied = {n for names in readers(model).values() if len(names) > 1 for n in names}
    if (
        not scaled
        or not all(_is_whole(owner.get_submodule(n), u) for n, u in others.items())
        or tied & _replaced(others)
    ):
        return None
    inputs = frozenset(n for n, u in scaled.items() if u.inputs)
    kinds = {kind_of(owner.get_submodule(n)) for n in scaled}
    config = {
        "peft_type": "IA3", "task_type": None, "base_model_name_or_path": base, "target_modules": sorted(scaled),
        "feedforward_modules": sorted(inputs), "fan_in_fan_out": kinds == {Conv1DKind}, "modules_to_save": sorted(others) or None,
        "init_ia3_weights": True, "inference_mode": True,
    }  # fmt: skip
    tensors = {f"{n}.l": u.whole(owner.get_submodule(n)) for n, u in scaled.items()}
    return _with(file, config, tensors=file.tensors | tensors, inputs=inputs)


def _is_whole(module: nn.Module, update: Update) -> bool:
    own = {n for n, p in module._parameters.items() if p is not None}
    return isinstance(update, Replaced) and own == set(update._parameters)


def _as_prompt(model: Any, file: MethodFile, updates: Mapping[str, Update], base: str | None) -> MethodFile | None:
    """As PEFT has prompt tuning of a decoder: the prompt, and nothing else."""
    (update,), owner = (*updates.values(),) if len(updates) == 1 else (None,), owner_of(model)
    config = getattr(owner, "config", None)
    generates = getattr(owner, "can_generate", lambda: False)() and not getattr(config, "is_encoder_decoder", False)
    if not isinstance(update, Prepended) or not generates:
        return None
    length, d = update.rows.shape
    made = {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "num_virtual_tokens": length,
        "token_dim": d, "num_transformer_submodules": 1, "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None), "prompt_tuning_init": "RANDOM", "inference_mode": True,
    }  # fmt: skip
    return _with(file, made, tensors={PROMPT: update.rows})


# --- a file as updates ------------------------------------------------------------------------------------------


def method_in(file: MethodFile, path: Path) -> Any:
    """The method's settings. Raises FileError where the file's are none."""
    try:
        return from_mapping(method_class(file.method), file.settings, where=str(path))
    except DeltaWError as error:
        raise FileError(f"The adapter in {path} cannot be used by this version of deltaw: {error}") from error


def restored(
    model: nn.Module, file: MethodFile, path: Path, *, device: torch.device | None = None
) -> dict[str, Update]:
    """The updates that the file's settings plan on this model, with the file's values, on `device` (default: the layers'). Raises
    FileError with every tensor that is missing, unexpected or of another shape."""
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced
            updates = dict(method_in(file, path).plan(owner_of(model)).updates)
    except FileError:
        raise
    except DeltaWError as error:
        raise FileError(f"The adapter in {path} does not fit this model; nothing was changed:\n{error}") from error
    planned = _tensors(updates)
    given, differences = _named(file, updates), file.differences()
    beside = {n for n in given if is_beside(n) and n.rpartition(":")[0] in differences}
    problems = [f"{n} is missing" for n in planned if n not in given]
    problems += [
        f"{n} is unexpected{nearest(n, planned, count=1)}" for n in given if n not in planned and n not in beside
    ]
    problems += [
        f"{n} is {list(given[n].shape)}, the model needs {list(t.shape)}"
        for n, t in planned.items()
        if n in given and given[n].shape != t.shape
    ]
    problems += problems_with({n: t for n, t in given.items() if n in differences | beside})
    if problems:
        raise FileError(listing(f"The adapter in {path} does not fit this model; nothing was changed:", problems))
    given |= {n: from_difference(n, given, W0) for n, _, W0 in _with_base(model, given) if n in differences}
    whole = {id(p) for u in updates.values() if isinstance(u, (Replaced, ReplacedRows)) for p in u.parameters()}
    named = {n: p for p, names in readers(model).items() for n in names}
    for name, parameter in planned.items():
        value = given[name]
        if id(parameter) in whole and name in named:  # what stands in a base's place has its precision
            value = value.to(named[name].dtype)
        parameter.data = value.to(parameter.device if device is None else device)  # type: ignore[attr-defined]
    return updates


def _named(file: MethodFile, updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """The file's tensors by the names that they have on this model: a prompt, whatever its body is called; of a slice's vector
    its own entries."""
    given = dict(file.tensors)
    body = next((n for n, u in updates.items() if isinstance(u, Prepended)), None)
    if PROMPT in given and body is not None:
        given[dotted(body, "rows")] = given.pop(PROMPT)
    for name, update in updates.items():
        key = dotted(name, "l")
        if isinstance(update, Scaled) and update.rows is not None and key in given:
            whole, rows = given[key], update.rows.cpu()
            if len(whole) > int(rows.max()):
                given[key] = whole[rows]
    return given
