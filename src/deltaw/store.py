"""An attached adapter ↔ its folder: the glue between attached.py, which edits models, and files/, which knows none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw import attached as live
from deltaw.base_identity import base_fingerprint, layers_fingerprint
from deltaw.errors import AdapterError, FileError, listing, nearest
from deltaw.files import peft
from deltaw.layers import Conv1DKind, kind_of
from deltaw.lowrank import delta_norm
from deltaw.methods.lora import LoRA
from deltaw.updates import LowRank, Update
from deltaw.version import __version__


def save(
    model: nn.Module, path: str | Path, *, name: str = "default", training: Mapping[str, Any] | None = None
) -> Path:
    """Write adapter `name` as a PEFT-format folder, atomically, and read it back. `training` is kept in its metadata.

    Raises AdapterError for an unknown name, FileError when a value is not finite, A is all zero, or the file read back
    differs; a folder that was at `path` is then still there.
    """
    updates = _plain(live.updates(model, name))
    dead = [layer for layer, u in updates.items() if not bool(u.A.any())]
    if dead:
        raise FileError(listing("Not saved: A is all zero, so nothing could be learned, in", dead))
    record = live.find_record(model)
    assert record is not None
    attached = record.attached[name]
    metadata = {
        "deltaw_format": peft.FORMAT,
        "deltaw_version": __version__,
        peft.BASE: str(base_fingerprint(model)),
        peft.W0: str(layers_fingerprint(model, updates)),
    }
    transposed = [layer for layer, u in updates.items() if u.kind is Conv1DKind]
    if transposed:
        metadata[peft.TRANSPOSED] = json.dumps(transposed)
    training = attached.metadata.get("training") if training is None else training
    if training:
        metadata["deltaw_training"] = json.dumps(dict(training), sort_keys=True, ensure_ascii=False)
    factors: dict[str, tuple[Tensor, Tensor]] = {layer: (u.A, u.B) for layer, u in updates.items()}
    scales = {layer: u.scale for layer, u in updates.items()}
    return peft.write(Path(path), peft.LoRAFile(factors, scales, _config(model, attached.method, updates), metadata))


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    activate: bool = True,
    check_base: bool = True,
    dtype: torch.dtype | None = None,
) -> str:
    """Attach the adapter in folder `path`, not trainable, and make it active. Returns its name: `name`, or "default", or
    the folder's name where that is taken.

    Everything is checked before the model is touched. Raises FileError with all problems of the file, layers that the
    model lacks (with the nearest names) and shapes that differ; BaseMismatch when the file says it belongs to other base
    weights (`check_base=False` overrides). A file without a fingerprint (not ours) is a logged warning.

    `dtype` stores A and B in that precision instead of the file's, bfloat16 say in half the bytes; what it costs is in
    `summary(model).adapters[name].rounding`.
    """
    path = Path(path)
    file = peft.read(path)
    taken = live.adapters(model)
    if name is None:
        name = "default" if "default" not in taken else path.name.replace(".", "_")
    live.check_free(model, name)
    if check_base:
        peft.check_base(file, path, peft.BASE, lambda: base_fingerprint(model))
    updates = _fitted(model, file, path)
    training = _training(file, path)
    metadata: dict[str, Any] = {"training": training} if training else {}
    if dtype is not None:
        metadata["rounding"] = _stored_as(updates, dtype)
    live.apply_plan(model, live.Plan(updates), _method(file), name=name, activate=activate, metadata=metadata)
    return name


def training_of(path: str | Path) -> dict[str, Any]:
    """What the adapter's file says about how it was trained (prompt template, data form …); empty for foreign files."""
    return _training(peft.read(Path(path)), Path(path))


def _training(file: peft.LoRAFile, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.metadata.get("deltaw_training", "{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FileError(f"{path}: the training settings in the metadata of {peft.WEIGHTS} are damaged.")
    return found


def _fitted(model: nn.Module, file: peft.LoRAFile, path: Path) -> dict[str, LowRank]:
    """The file's updates for this model's layers, in the model's order; FileError with everything that does not fit."""
    layers = dict(live.base_modules(model))
    problems: list[str] = []
    updates: dict[str, LowRank] = {}
    for layer_name, (A, B) in file.factors.items():
        layer: Any = layers.get(layer_name)
        if layer is None:
            problems.append(f"the model has no layer {layer_name!r}{nearest(layer_name, layers, count=1)}")
            continue
        kind = kind_of(layer)
        if kind is None:
            problems.append(f"{layer_name!r} is a {type(layer).__name__}, which cannot take the update")
            continue
        d, k = kind.W0(layer).shape
        if (B.shape[0], A.shape[1]) != (d, k):
            problems.append(f"{layer_name!r} is {d}×{k} in the model, {B.shape[0]}×{A.shape[1]} in the file")
            continue
        device = layer.weight.device
        dropout = float(file.config.get("lora_dropout") or 0.0)
        updates[layer_name] = LowRank(kind, A.to(device), B.to(device), file.scales[layer_name], dropout)
    if problems:
        raise FileError(listing(f"The adapter in {path} does not fit this model; nothing was changed:", problems))
    return {n: updates[n] for n in layers if n in updates}


def _stored_as(updates: Mapping[str, LowRank], dtype: torch.dtype) -> float:
    """Give A and B this dtype; ‖ΔW − ΔW'‖ / ‖ΔW‖ over all layers together."""
    error = total = 0.0
    for update in updates.values():
        A, B = update.A.detach(), update.B.detach()
        update.A, update.B = nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype))
        stored = update.A.detach(), update.B.detach()
        both = torch.cat([A.double(), stored[0].double()]), torch.cat([B.double(), -stored[1].double()], dim=1)
        error += delta_norm(*both, update.scale) ** 2
        total += delta_norm(A, B, update.scale) ** 2
    return (error / total) ** 0.5 if total else 0.0


def _plain(updates: Mapping[str, Update]) -> dict[str, LowRank]:
    """The updates, if they are A and B alone. Raises AdapterError."""
    others = [n for n, u in updates.items() if not (isinstance(u, LowRank) and u.plain)]
    if others:
        raise AdapterError(
            listing("Not saved: these updates are more than A and B, which has no file format yet:", others)
        )
    return {n: u for n, u in updates.items() if isinstance(u, LowRank)}


def _method(file: peft.LoRAFile) -> LoRA:
    """The settings a file was made with, as far as it says them."""
    config = file.config
    return LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets={layer: A.shape[0] for layer, (A, _) in file.factors.items()},
        dropout=float(config.get("lora_dropout") or 0.0),
        scaling="alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
    )


def _config(model: nn.Module, method: Any, updates: Mapping[str, LowRank]) -> dict[str, Any]:
    if not isinstance(method, LoRA):
        raise AdapterError(f"{type(method).__name__} has no file format yet.")
    base = live.owner_of(model)
    return peft.config_for(
        {layer: u.rank for layer, u in updates.items()},
        {layer: u.scale for layer, u in updates.items()},
        target_modules=_target_modules(model, updates),
        dropout=method.dropout,
        rank_stabilised=method.scaling == "alpha/sqrt(r)",
        transposed=all(u.kind is Conv1DKind for u in updates.values()),
        base=getattr(getattr(base, "config", None), "_name_or_path", None) or None,
        task=_task(base),
    )


def _task(base: Any) -> str | None:
    """PEFT's name of what the model does, where its reader needs no more than that: for classifiers it would want a head."""
    if not getattr(base, "can_generate", lambda: False)():
        return None
    return "SEQ_2_SEQ_LM" if getattr(base.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _target_modules(model: nn.Module, updates: Mapping[str, LowRank]) -> list[str]:
    """The shortest list that PEFT reads as exactly these layers: the last parts of their names where no other module
    ends so, else the full names."""
    ends = {name.rsplit(".", 1)[-1] for name in updates}
    matched = {name for name, _ in live.base_modules(model) if name.rsplit(".", 1)[-1] in ends}
    return sorted(ends if matched == set(updates) else updates)
