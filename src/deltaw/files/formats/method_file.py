"""Adapter folders of methods other than LoRA: a method's name, its settings, and the tensors that it trained. No model code.

The settings say which tensors there are; the file has them by the names of their modules. Where PEFT has the method ((IA)³,
prompt tuning), the folder is PEFT's, and the settings are in our metadata; PEFT's own folders have them in their config. Values
in place of a base's own are kept as differences from them, which give them back bit for bit.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltaw.errors import FileError
from deltaw.files.formats.atomic import replacing_folder
from deltaw.files.formats.peft import FORMAT, UNKNOWN, is_ours, said_left_out, tensors_of
from deltaw.files.formats.peft_config import (
    CONFIG,
    METHOD,
    OF_ALL,
    OF_OTHERS,
    WEIGHTS,
    read_config,
    saved_module,
    unknown_problems,
    unknown_settings,
)
from deltaw.files.formats.peft_keys import PREFIX
from deltaw.files.formats.peft_targets import is_meant, target_problems

log = logging.getLogger("deltaw")

# Metadata: JSON, the method's settings; the base's parameters that the file has values for, and those that it has as differences
SETTINGS, REPLACED, DIFFERENCES = "deltaw_settings", "deltaw_replaced", "deltaw_differences"
PROMPT = "prompt_embeddings"
_IA3_KEY = re.compile(r"(?P<layer>.+)\.ia3_l(?:\.[^.]+)?")


@dataclass(frozen=True)
class MethodFile:
    """An adapter of any method but LoRA as it is on disk, its tensors on the CPU."""

    method: str
    """As methods/registry.py names it."""
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    """Dotted name of a module, and the update's own name → what was trained. A prompt's name is PROMPT."""
    config: dict[str, Any]
    """adapter_config.json."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Ours, from the safetensors header. Empty for foreign files."""
    inputs: frozenset[str] = frozenset()
    """(IA)³'s layers whose inputs are scaled."""

    def replaced(self) -> set[str]:
        """Names of the base's parameters that the adapter has values for."""
        return set(json.loads(self.metadata.get(REPLACED, "[]")))

    def differences(self) -> set[str]:
        """Names of the tensors that are W − W0."""
        return set(json.loads(self.metadata.get(DIFFERENCES, "[]")))


def read(folder: Path) -> MethodFile:
    """Raises FileError with every problem of the file itself."""
    config = read_config(folder)
    tensors, metadata = tensors_of(folder)
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise FileError(f"The adapter in {folder} cannot be used: values are not finite in", bad)
    if METHOD in config:
        plain = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        return MethodFile(str(config[METHOD]), _settings(config.get("settings"), folder), plain, config, metadata)
    tensors = tensors if is_ours(metadata) else _foreign(folder, config, tensors)
    found = (_ia3 if config.get("peft_type") == "IA3" else _prompt)(folder, config, tensors, metadata)
    return found if SETTINGS not in metadata else _with_settings(found, folder)


def _foreign(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of PEFT's that its settings mean. Raises FileError for settings that are not known, or not sound."""
    known = OF_ALL | OF_OTHERS[config["peft_type"]]
    problems = unknown_problems(config, known) + (target_problems(config) if config["peft_type"] == "IA3" else [])
    if problems:
        raise FileError(f"The adapter in {folder} cannot be used:", problems)
    if unknown := unknown_settings(config, known):
        log.warning(UNKNOWN, folder, ", ".join(unknown))
    scaled = {key: match["layer"] for key in tensors if (match := _IA3_KEY.fullmatch(key.removeprefix(PREFIX)))}
    answers = {layer: is_meant(layer, config, dense=True, stack=False) for layer in scaled.values()}
    left_out = said_left_out(answers, config, folder / WEIGHTS)
    return {key: tensor for key, tensor in tensors.items() if scaled.get(key) not in left_out}


def _with_settings(file: MethodFile, folder: Path) -> MethodFile:
    try:
        settings = json.loads(file.metadata[SETTINGS])
    except ValueError:
        settings = None
    return MethodFile(file.method, _settings(settings, folder), file.tensors, file.config, file.metadata, file.inputs)


def _settings(found: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise FileError(f"{folder}: the method's settings are damaged ({found!r}).")
    return found


def _ia3(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> MethodFile:
    found: dict[str, Tensor] = {}
    inputs, problems = set(), []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _IA3_KEY.fullmatch(name):
            if tensor.ndim != 2 or 1 not in tensor.shape:
                problems.append(f"{key} is {list(tensor.shape)}; it must be [d, 1] or [1, k]")
            elif tensor.shape[0] == 1 and _is_feedforward(match["layer"], config):
                inputs.add(match["layer"])
            found[f"{match['layer']}.l"] = tensor.flatten()
        elif saved_module(name, config):
            found[re.sub(r"\.modules_to_save(?:\.[^.]+(?=\.))?(?=\.)", "", name)] = tensor
        else:
            problems.append(f"unexpected key {key!r}")
    if problems or not found:
        raise FileError(f"The adapter in {folder} cannot be used:", problems or [f"{WEIGHTS} has no vectors of (IA)³"])
    layers = [name.removesuffix(".l") for name in found if name.endswith(".l")]
    settings = {
        "targets": [layer for layer in layers if layer not in inputs],
        "inputs": [layer for layer in layers if layer in inputs],
        "whole": sorted({name.rpartition(".")[0] for name in found if not name.endswith(".l")}),
    }
    return MethodFile("ia3", settings, found, config, metadata, frozenset(inputs))


def _is_feedforward(layer: str, config: Mapping[str, Any]) -> bool:
    wanted = config.get("feedforward_modules") or []
    if isinstance(wanted, str):
        return re.fullmatch(wanted, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in wanted)


def _prompt(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> MethodFile:
    rows, length = tensors.get(PROMPT), config.get("num_virtual_tokens")
    if set(tensors) != {PROMPT} or rows is None or rows.ndim != 2 or len(rows) != length:
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        raise FileError(
            f"The adapter in {folder} cannot be used: {WEIGHTS} must hold {PROMPT} [{length}, d] and nothing else (of an "
            f"encoder-decoder deltaw reads its own files alone); it has {shapes}."
        )
    return MethodFile("prefix", {"length": length, "where": "embedding"}, dict(tensors), config, metadata)


def write(folder: Path, file: MethodFile, beside: Callable[[Path], None] = lambda folder: None) -> Path:
    """Write the folder atomically, then read it back and compare; `beside` adds other files to it. Raises FileError when what
    was read differs."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _keys(file).items()}
    bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise FileError("Not saved: values are not finite (NaN or infinity) in", bad)
    metadata = {"format": "pt", "deltaw_format": FORMAT, SETTINGS: json.dumps(file.settings), **file.metadata}
    with replacing_folder(folder) as temporary:
        text = json.dumps(file.config, indent=2, sort_keys=True, ensure_ascii=False)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, metadata=metadata)
        back = read(temporary)
        again = _keys(back)
        same = again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
        if not same or (back.method, back.settings) != (file.method, json.loads(json.dumps(file.settings))):
            raise FileError(f"Not saved: what was written to {folder} did not read back the same.")
        beside(temporary)
    return folder


def _keys(file: MethodFile) -> dict[str, Tensor]:
    """The file's tensors by their keys."""
    if "peft_type" not in file.config:
        return {f"{PREFIX}{name}": tensor for name, tensor in file.tensors.items()}
    if file.config["peft_type"] == "PROMPT_TUNING":
        return dict(file.tensors)
    found = {}
    for name, tensor in file.tensors.items():
        layer, _, own = name.rpartition(".")
        if own == "l":
            found[f"{PREFIX}{layer}.ia3_l"] = tensor.view(1, -1) if layer in file.inputs else tensor.view(-1, 1)
        else:
            found[f"{PREFIX}{name}"] = tensor
    return found


# What a tensor's name is followed by: places of entries that W0 + ΔW does not give back, and these entries
_WHERE, _ENTRIES = ":where", ":entries"


def as_difference(name: str, W: Tensor, W0: Tensor) -> dict[str, Tensor]:
    """ΔW = W − W0 in W's dtype, fp32 or wider, under `name`; and, since fl(W0 + fl(W − W0)) is not always W (it is where they are
    within a factor of two: Sterbenz), the entries where it is not."""
    dW = (W - W0.to(W.dtype)).nan_to_num(posinf=0, neginf=0)
    where = (_bits(W0.to(W.dtype) + dW) != _bits(W)).flatten().nonzero().flatten()
    if not len(where):
        return {name: dW}
    return {name: dW, name + _WHERE: where, name + _ENTRIES: W.flatten()[where]}


def from_difference(name: str, tensors: Mapping[str, Tensor], W0: Tensor) -> Tensor:
    """W, on the CPU as `tensors` are."""
    W = W0.to(tensors[name]) + tensors[name]
    if name + _WHERE in tensors:
        W.view(-1)[tensors[name + _WHERE]] = tensors[name + _ENTRIES]
    return W


def problems_with(tensors: Mapping[str, Tensor]) -> list[str]:
    """Say what is wrong with the entries beside differences."""
    found = []
    for name, dW in tensors.items():
        where, entries = tensors.get(name + _WHERE), tensors.get(name + _ENTRIES)
        if where is None and entries is None:
            continue
        if where is None or entries is None or not _are_entries(where, entries, dW.numel()):
            found.append(f"{name}: the entries kept beside its difference are not entries of it")
    return found


def _are_entries(where: Tensor, entries: Tensor, count: int) -> bool:
    if where.dtype != torch.int64 or where.ndim != 1 or where.shape != entries.shape:
        return False
    return not where.numel() or 0 <= int(where.min()) <= int(where.max()) < count


def is_beside(name: str) -> bool:
    """Whether it is the name of what stands beside a difference."""
    return name.endswith((_WHERE, _ENTRIES))


def _bits(tensor: Tensor) -> Tensor:
    """As integers: −0 and 0 are equal as numbers."""
    return tensor.contiguous().view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)
