"""Adapter folders of methods other than LoRA: a method's name, its settings, and the tensors that it trained. No model code.

The settings say which tensors there are; the file has them by the names of their modules. Where PEFT has the method ((IA)³,
prompt tuning), the folder is PEFT's, and the settings are in our metadata; PEFT's own folders have them in their config. Values
in place of a base's own are kept as differences from them, which give them back bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import FileError
from deltaw.files.formats.peft.config import (
    OF_ALL,
    OF_OTHERS,
    UNKNOWN,
    WEIGHTS,
    PeftConfig,
    read_config,
    unknown_problems,
    unknown_settings,
)
from deltaw.files.formats.peft.keys import PREFIX, without_copy
from deltaw.files.formats.peft.metadata import FORMAT, FORMAT_KEY, is_ours
from deltaw.files.formats.peft.reading import tensors_of
from deltaw.files.formats.peft.targets import is_meant, left_out, names, saved_module, target_problems
from deltaw.files.formats.peft.writing import alike, write_folder
from deltaw.files.formats.strict_json import parse, parse_texts
from deltaw.layers.tree import is_finite

log = logging.getLogger("deltaw")

# Metadata: JSON, the method's settings; the base's parameters that the file has values for, and those that it has as differences
SETTINGS, REPLACED, DIFFERENCES = "deltaw_settings", "deltaw_replaced", "deltaw_differences"
PROMPT = "prompt_embeddings"
_IA3_KEY = re.compile(r"(?P<layer>.+)\.ia3_l(?:\.[^.]+)?")

Settings = dict[str, object]
"""A method's settings by their names, as config.py's `to_mapping` gives them."""


@dataclass(frozen=True)
class MethodFile:
    """An adapter of any method but LoRA as it is on disk, its tensors on the CPU."""

    method: str
    """As methods/registry.py names it."""
    settings: Settings
    tensors: dict[str, Tensor]
    """Dotted name of a module and the update's own name → what was trained. A prompt's name is PROMPT."""
    config: PeftConfig
    """adapter_config.json."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The safetensors header's. Empty for foreign files."""
    inputs: frozenset[str] = frozenset()
    """(IA)³'s layers whose inputs are scaled."""

    def replaced(self) -> set[str]:
        """Return the names of the base's parameters that the adapter has values for."""
        return _names_in(self.metadata, REPLACED)

    def differences(self) -> set[str]:
        """Return the names of the tensors that are W − W0."""
        return _names_in(self.metadata, DIFFERENCES)


def _names_in(metadata: Mapping[str, str], key: str) -> set[str]:
    """Return the names that the metadata list under a key. Raises FileError for a damaged list."""
    try:
        return set(parse_texts(metadata.get(key, "[]")))
    except ValueError as error:
        raise FileError(f"The list {key} in the metadata of {WEIGHTS} is damaged: {error}") from error


def read(folder: Path) -> MethodFile:
    """Read and check a folder. Raises FileError with every problem of the file itself."""
    config = read_config(folder)
    tensors, metadata = tensors_of(folder)
    if bad := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
        raise FileError(f"The adapter in {folder} cannot be used: values are not finite in", bad)
    if config.method is not None:
        plain = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        if len(plain) < len(tensors):
            raise FileError(f"The adapter in {folder} cannot be used: {WEIGHTS} has a tensor under two names.")
        settings = _settings(config.settings.get("settings"), folder)
        return MethodFile(config.method, settings, plain, config, metadata)
    tensors = tensors if is_ours(metadata) else _foreign(folder, config, tensors)
    of_peft = _ia3 if config.peft_type == "IA3" else _prompt
    file = of_peft(folder, config, tensors, metadata)
    return file if SETTINGS not in metadata else _with_settings(file, folder)


def _foreign(folder: Path, config: PeftConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file of PEFT's that its settings mean.

    Raises FileError for settings that are not known, or not sound.
    """
    kind = config.peft_type or ""
    known = OF_ALL | OF_OTHERS[kind]
    problems = unknown_problems(config.settings, known)
    problems += target_problems(config.settings) if kind == "IA3" else []
    if problems:
        raise FileError(f"The adapter in {folder} cannot be used:", problems)
    if unknown := unknown_settings(config.settings, known):
        log.warning(UNKNOWN, folder, ", ".join(unknown))
    scaled = {key: match["layer"] for key in tensors if (match := _IA3_KEY.fullmatch(key.removeprefix(PREFIX)))}
    answers = {layer: is_meant(layer, config, dense=True, stack=False) for layer in scaled.values()}
    unmeant = left_out(answers, config, folder / WEIGHTS)
    return {key: tensor for key, tensor in tensors.items() if scaled.get(key) not in unmeant}


def _with_settings(file: MethodFile, folder: Path) -> MethodFile:
    """Return the file with the settings of its metadata. Raises FileError for damaged ones."""
    try:
        settings = parse(file.metadata[SETTINGS])
    except ValueError:
        settings = None
    return dataclasses.replace(file, settings=_settings(settings, folder))


def _settings(value: object, folder: Path) -> Settings:
    """Return a method's settings. Raises FileError for a value that is none."""
    if not isinstance(value, dict):
        raise FileError(f"{folder}: the method's settings are damaged ({json.dumps(value)}).")
    return value


def _ia3(folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> MethodFile:
    """Return PEFT's (IA)³ as ours. Raises FileError with each tensor that is no part of it."""
    values: dict[str, Tensor] = {}
    inputs, problems = set(), []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _IA3_KEY.fullmatch(name):
            if tensor.ndim != 2 or 1 not in tensor.shape or not tensor.is_floating_point():
                problems.append(
                    f"{key} is {tensor.dtype} {list(tensor.shape)}; it must be floating point, [d, 1] or [1, k]"
                )
            elif tensor.shape[0] == 1 and names(config.feedforward_modules, match["layer"]):
                inputs.add(match["layer"])
            if f"{match['layer']}.l" in values:
                problems.append(f"{match['layer']} has two vectors")
            values[f"{match['layer']}.l"] = tensor.flatten()
        elif saved_module(name, config):
            values[without_copy(name)] = tensor
        else:
            problems.append(f"unexpected key {key!r}")
    if problems or not values:
        raise FileError(f"The adapter in {folder} cannot be used:", problems or [f"{WEIGHTS} has no vectors of (IA)³"])
    layers = [name.removesuffix(".l") for name in values if name.endswith(".l")]
    settings: Settings = {
        "targets": [layer for layer in layers if layer not in inputs],
        "inputs": [layer for layer in layers if layer in inputs],
        "whole": sorted({name.rpartition(".")[0] for name in values if not name.endswith(".l")}),
    }
    return MethodFile("ia3", settings, values, config, metadata, frozenset(inputs))


def _prompt(folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> MethodFile:
    """Return PEFT's prompt, rows [length, d], as ours. Raises FileError for a file of anything else."""
    rows, length = tensors.get(PROMPT), config.num_virtual_tokens
    if (
        set(tensors) != {PROMPT}
        or rows is None
        or rows.ndim != 2
        or len(rows) != length
        or not rows.is_floating_point()
    ):
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        raise FileError(
            f"The adapter in {folder} cannot be used: {WEIGHTS} must hold {PROMPT} [{length or 'num_virtual_tokens'}, d] and "
            f"nothing else (of an encoder-decoder deltaw reads its own files alone); it has {shapes}."
        )
    return MethodFile("prefix", {"length": length, "where": "embedding"}, dict(tensors), config, metadata)


def write(folder: Path, file: MethodFile, beside: Callable[[Path], None] = lambda folder: None) -> Path:
    """Write the folder atomically, then read it back and compare. `beside` adds other files to it.

    Raises FileError for values that are not finite, and when the file reads back differently.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _keys(file).items()}
    metadata = {"format": "pt", FORMAT_KEY: FORMAT, SETTINGS: json.dumps(file.settings), **file.metadata}
    settings = json.loads(json.dumps(file.settings))

    def same(temporary: Path) -> bool:
        back = read(temporary)
        return alike(_keys(back), tensors) and (back.method, back.settings) == (file.method, settings)

    return write_folder(folder, file.config, tensors, metadata, same, beside)


def _keys(file: MethodFile) -> dict[str, Tensor]:
    """Return the file's tensors by their keys."""
    if file.config.peft_type is None:
        return {f"{PREFIX}{name}": tensor for name, tensor in file.tensors.items()}
    if file.config.peft_type == "PROMPT_TUNING":
        return dict(file.tensors)
    tensors = {}
    for name, tensor in file.tensors.items():
        layer, _, last = name.rpartition(".")
        if last == "l":
            tensors[f"{PREFIX}{layer}.ia3_l"] = tensor.view(1, -1) if layer in file.inputs else tensor.view(-1, 1)
        else:
            tensors[f"{PREFIX}{name}"] = tensor
    return tensors


# --- differences ------------------------------------------------------------------------------------------------

# Behind a tensor's name: places of entries that W0 + ΔW does not give back, and these entries
_WHERE, _ENTRIES = ":where", ":entries"


def as_difference(name: str, W: Tensor, W0: Tensor) -> dict[str, Tensor]:
    """Return ΔW = W − W0 under `name`, in W's dtype, fp32 or wider, and the entries that W0 + ΔW does not give back.

    fl(W0 + fl(W − W0)) is W where the two are within a factor of two (Sterbenz), and not always elsewhere.
    """
    dW = (W - W0.to(W.dtype)).nan_to_num(posinf=0, neginf=0)
    where = (_bits(W0.to(W.dtype) + dW) != _bits(W)).flatten().nonzero().flatten()
    if not len(where):
        return {name: dW}
    return {name: dW, name + _WHERE: where, name + _ENTRIES: W.flatten()[where]}


def from_difference(name: str, tensors: Mapping[str, Tensor], W0: Tensor) -> Tensor:
    """Return W, on the device that `tensors` are on: the inverse of `as_difference`."""
    W = W0.to(tensors[name]) + tensors[name]
    if name + _WHERE in tensors:
        W.view(-1)[tensors[name + _WHERE]] = tensors[name + _ENTRIES]
    return W


def problems_with(tensors: Mapping[str, Tensor]) -> list[str]:
    """List what is wrong with the entries beside differences."""
    problems = []
    for name, dW in tensors.items():
        where, entries = tensors.get(name + _WHERE), tensors.get(name + _ENTRIES)
        if where is None and entries is None:
            continue
        if where is None or entries is None or not _are_entries(where, entries, dW.numel()):
            problems.append(f"{name}: the entries kept beside its difference are not entries of it")
    return problems


def _are_entries(where: Tensor, entries: Tensor, count: int) -> bool:
    """Return whether `where` [n], int64, are places among `count` entries, and `entries` has as many."""
    if where.dtype != torch.int64 or where.ndim != 1 or where.shape != entries.shape:
        return False
    return not where.numel() or 0 <= int(where.min()) <= int(where.max()) < count


def is_beside(name: str) -> bool:
    """Return whether a tensor of this name stands beside a difference."""
    return name.endswith((_WHERE, _ENTRIES))


def _bits(tensor: Tensor) -> Tensor:
    """Return the entries as integers, by which −0 and 0 differ."""
    return tensor.contiguous().view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)
