"""An adapter's file as this model means it: the names of its layers here, stacks for single experts, layers that PEFT has.

Other versions of transformers and wrappers give layers other names; transformers 4 had single experts where there are stacks now.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from deltaw.errors import FileError, shown
from deltaw.files.formats.method_file import MethodFile
from deltaw.files.formats.peft.adapter import LoRAFile
from deltaw.files.formats.peft.config import PeftConfig
from deltaw.files.formats.peft.keys import in_file
from deltaw.files.formats.peft.metadata import SLICES, slices_of
from deltaw.files.formats.peft.ranks import exactly
from deltaw.files.formats.peft.targets import is_all_linear, parameters_anywhere, saved_module
from deltaw.layers.kinds import Conv1DKind, Weight, kind_of, weights_of
from deltaw.layers.names import (
    common_prefix,
    found_as,
    in_order,
    other_names,
    plain_names,
    unwrapped,
    unwrapped_pattern,
    without_peft_prefix,
)
from deltaw.layers.ops.merging import times
from deltaw.layers.source import only_read
from deltaw.layers.tree import owner_of
from deltaw.methods.updates.base import own_tensor

log = logging.getLogger("deltaw")

T = TypeVar("T")


# --- names ------------------------------------------------------------------------------------------------------


def renamed(file: LoRAFile, known: Collection[str]) -> LoRAFile:
    """Return the file with this model's names for the layers that go by others in it, and log them.

    Args:
        file: the adapter, by names of another version of transformers, or with what wrappers put into names.
        known: the names of the model's modules.

    Raises:
        FileError: for two names of one layer.
    """
    if not file.wrapped and all(layer in known for layer in file.factors) and not (file.whole or file.rows):
        return file
    names = [*file.factors, *file.rows, *(name.rpartition(".")[0] for name in file.whole)]
    renaming = Renaming(known, file.wrapped, [name.partition(".base_layer")[0] for name in names])
    result = _with_names(file, renaming.module, renaming.parameter, _metadata(renaming.module, file))
    renaming.log()
    return replace(result, wrapped=None)


def renamed_method(file: MethodFile, known: Collection[str]) -> MethodFile:
    """Do as `renamed` for an adapter of another method: rename its tensors, and the layers that its settings name."""
    renaming = Renaming(known, None, [])

    def tensor(name: str) -> str:
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            if (new := renaming.known_as(".".join(parts[:cut]))) is not None:
                return ".".join([new, *parts[cut:]])
        return name

    def settings(value: object) -> object:
        if isinstance(value, list):
            return [settings(inner) for inner in value]
        return (renaming.known_as(value) if isinstance(value, str) and "." in value else None) or value

    result = replace(
        file, tensors=_by(tensor, file.tensors), inputs=frozenset(renaming.known_as(n) or n for n in file.inputs),
        settings={key: settings(value) for key, value in file.settings.items()},
    )  # fmt: skip
    renaming.log()
    return result


def plainly_named_method(file: MethodFile) -> MethodFile:
    """Do as `plainly_named` for an adapter of another method."""
    return replace(
        file, tensors=_by(unwrapped, file.tensors), inputs=frozenset(map(unwrapped, file.inputs)),
        settings=_plain_settings(file.settings), config=PeftConfig.of(_plain_settings(file.config.settings)),
        metadata=_plain_texts(file.metadata),
    )  # fmt: skip


def plainly_named(file: LoRAFile) -> LoRAFile:
    """Return the file of a model that has wrappers inside, by the names that its modules have without them."""
    names = [*file.factors, *file.rows, *file.whole, *file.copies]
    if all(unwrapped(name) == name for name in names):
        return file
    result = _with_names(file, unwrapped, unwrapped, _plain_texts(file.metadata))
    return replace(result, config=PeftConfig.of(_plain_settings(file.config.settings)))


def _with_names(
    file: LoRAFile, module: Callable[[str], str], parameter: Callable[[str], str], metadata: dict[str, str]
) -> LoRAFile:
    """Return the file with other names of modules and of parameters. Raises FileError for names that become one."""
    return replace(
        file,
        factors=_by(module, file.factors), scales=_by(module, file.scales), magnitudes=_by(module, file.magnitudes),
        biases=_by(module, file.biases), rows=_by(module, file.rows), whole=_by(parameter, file.whole),
        copies=_by(parameter, file.copies), originals=_by(parameter, file.originals),
        embeddings=frozenset(map(module, file.embeddings)), kernels=_by(module, file.kernels), metadata=metadata,
        unclear=frozenset(map(module, file.unclear)),
    )  # fmt: skip


def _plain_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Return settings without what wrappers put into names, and into patterns of names."""
    return {unwrapped_pattern(key): _plain_value(value) for key, value in settings.items()}


def _plain_value(value: object) -> object:
    if isinstance(value, Mapping):
        return _plain_settings(value)
    if isinstance(value, list):
        return [_plain_value(inner) for inner in value]
    return unwrapped_pattern(value) if isinstance(value, str) else value


def _plain_texts(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: unwrapped_pattern(text) for key, text in metadata.items()}


class Renaming:
    """This model's names (`known`) of the modules that a file names. It notes which of them are others, for `log`."""

    def __init__(self, known: Collection[str], wrapped: str | None, names: Sequence[str]) -> None:
        self.known, self.plain = known, plain_names(known)
        self.wrapped = {} if wrapped is None else {wrapped: unwrapped(without_peft_prefix(wrapped))}
        self.other: dict[str, str] = {}
        self.outer = common_prefix(names, known, self.plain)

    def module(self, name: str) -> str:
        """Return this model's name of a module, or of a part of PEFT's wrapper around one; the name itself without one."""
        outer, inside, part = name.partition(".base_layer")
        new = self.known_as(outer)
        if new is None and not inside:  # a parameter that has no layer
            outer, inside, part = name.rpartition(".")
            new = self.known_as(outer) if outer else None
        return name if new is None else f"{new}{inside}{part}"

    def known_as(self, name: str) -> str | None:
        """Return this model's name of a module; None where it has none."""
        new = found_as(name.removeprefix(self.outer), self.known, self.plain)
        if new is not None:
            if new != name:
                self.wrapped[name] = new
            return new
        others = other_names(unwrapped(name.removeprefix(self.outer)))
        new = next((place for other in others if (place := found_as(other, self.known, self.plain)) is not None), None)
        if new is not None:
            self.other[name] = new
        return new

    def parameter(self, name: str) -> str:
        """Return this model's name of a parameter."""
        layer, _, own_name = name.rpartition(".")
        return f"{self.module(layer)}.{own_name}"

    def log(self) -> None:
        """Say which names are others, in one line each for wrappers and for versions."""
        if self.wrapped:
            old, new = next(iter(self.wrapped.items()))
            log.warning(
                "Names of wrappers (torch.compile, DDP, FSDP) are left out or put in: %s is read as %s.", old, new
            )
        if self.other:
            old, new = next(iter(self.other.items()))
            log.warning(
                "%d layers of the adapter have other names in this model: %s is %s here, for one.",
                len(self.other), old, new,
            )  # fmt: skip


def _metadata(module: Callable[[str], str], file: LoRAFile) -> dict[str, str]:
    """Return the file's metadata with other names of the layers that have slices."""
    slices = slices_of(file.metadata)
    return {**file.metadata, SLICES: json.dumps(_by(module, slices))} if slices else file.metadata


def _by(new: Callable[[str], str], values: Mapping[str, T]) -> dict[str, T]:
    """Return values by new names. Raises FileError for names that become one."""
    names: dict[str, list[str]] = {}
    for name in values:
        names.setdefault(new(name), []).append(name)
    twice = [
        f"{' and '.join(map(repr, old))} are {name!r} in this model" for name, old in names.items() if len(old) > 1
    ]
    if twice:
        raise FileError("The adapter's file has two updates of one layer:", twice)
    return {name: values[old[0]] for name, old in names.items()}


# --- single experts ---------------------------------------------------------------------------------------------

# A dense layer of one expert; Mixtral's w1, w3 and w2 are others' gate_proj, up_proj and down_proj
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<layer>w1|w2|w3|gate_proj|up_proj|down_proj)")
# Parameter of a stack → the layers of an expert whose rows it has, one below the other
_PARTS = {"gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")), "down_proj": (("w2", "down_proj"),)}

_Singles = dict[tuple[int, int], str]
"""Number of an expert, place of a layer in the stack's rows → the layer's name in the file."""


@dataclass(frozen=True)
class _Stack:
    """One stack's update."""

    pair: tuple[Tensor, Tensor]
    """A [E·r, k] and B [d, r·E], as files have them."""
    scale: float
    rank: int
    """r of each of its matrices."""


def stacked(file: LoRAFile, layers: Mapping[str, nn.Module]) -> LoRAFile:
    """Return the file with one update for each stack of experts that the model's `layers` have in place of single ones.

    A stack of two layers' rows gets the rank of both together, as PEFT (0.21) makes it: A's one below the other, B's in blocks.

    Raises:
        FileError: with every expert that is missing, or has another rank.
    """
    single: dict[tuple[str, str], _Singles] = {}
    renaming = Renaming(layers, None, [])
    for layer in file.factors:
        match = _EXPERT.fullmatch(layer)
        module = None if match is None or layer in layers else _stack_for(renaming.known_as(match["experts"]), layers)
        if match is None or module is None:
            continue
        for parameter, parts in _PARTS.items():
            for place, names in enumerate(parts):
                if match["layer"] in names:
                    single.setdefault((module, parameter), {})[int(match["number"]), place] = layer
    if not single:
        return file
    problems: list[str] = []
    stacks = {
        f"{module}.{parameter}": _stack_of(file, len(own_tensor(layers[module], parameter)), parameter, names, problems)
        for (module, parameter), names in single.items()
    }
    if problems:
        raise FileError("The adapter has updates of single experts that do not make up this model's stacks:", problems)
    renaming.log()
    if file.config.use_rslora:
        log.warning(
            "Single experts are read with the scale α/√r that rsLoRA trained them with; "
            "PEFT (0.21) would give their gate_up_proj √2 times that."
        )
    singles = {name for names in single.values() for name in names.values()}
    return _with_stacks(file, singles, {name: stack for name, stack in stacks.items() if stack is not None})


def _stack_for(name: str | None, layers: Mapping[str, nn.Module]) -> str | None:
    """Return the name of a module, where that has experts in stacks."""
    stacks = name is not None and set(_PARTS) <= set(weights_of(layers[name]))
    return name if name is not None and stacks and not Weight(layers[name], "down_proj").transposed else None


def _stack_of(file: LoRAFile, E: int, parameter: str, names: _Singles, problems: list[str]) -> _Stack | None:
    """Return the update of a stack of E matrices with n layers' rows each: A [E·n·r, k] and B [d, n·r·E], as files have them."""
    first, n = next(iter(names.values())), len(_PARTS[parameter])
    wanted = [(e, part) for e in range(E) for part in range(n)]
    missing = [f"{first}: there is none of expert {e}, part {part}" for e, part in wanted if (e, part) not in names]
    missing += [f"{name}: there is no expert {e}" for (e, part), name in names.items() if (e, part) not in wanted]
    beyond = [
        f"{name}: DoRA's magnitude or a bias has no place in a stack"
        for name in names.values()
        if name in file.magnitudes or name in file.biases
    ]
    shapes = {tuple(t.shape) for name in names.values() for t in file.factors[name]}
    if len(shapes) > 2:
        missing.append(f"{first} and the other experts have A's and B's of different shapes ({sorted(shapes)})")
    problems += missing + beyond
    if missing or beyond:
        return None
    scale = file.scales[first]
    As, Bs = [], []
    for e in range(E):
        parts = [names[e, part] for part in range(n)]
        As.append(torch.cat([file.factors[name][0] for name in parts]))
        Bs.append(_diagonal([times(file.factors[name][1], file.scales[name] / scale) for name in parts]))
    return _Stack(in_file(torch.stack(As), torch.stack(Bs)), scale, rank=len(As[0]))


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Return the matrix with these blocks along its diagonal, zero elsewhere."""
    height, width = (sum(block.shape[side] for block in blocks) for side in (0, 1))
    matrix, row, column = blocks[0].new_zeros(height, width), 0, 0
    for block in blocks:
        matrix[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return matrix


def _with_stacks(file: LoRAFile, singles: set[str], stacks: Mapping[str, _Stack]) -> LoRAFile:
    """Return the file with these stacks in place of the updates of single experts."""
    factors = {n: pair for n, pair in file.factors.items() if n not in singles}
    factors |= {n: stack.pair for n, stack in stacks.items()}
    scales = {n: s for n, s in file.scales.items() if n not in singles} | {
        n: stack.scale for n, stack in stacks.items()
    }
    ranks = {exactly(n): stack.rank for n, stack in stacks.items()}
    config = file.config.changed(rank_pattern={**ranks, **file.config.rank_pattern})
    return replace(file, factors=factors, scales=scales, config=config)


# --- what PEFT has on this model --------------------------------------------------------------------------------


def as_meant(model: nn.Module, layers: Mapping[str, nn.Module], file: LoRAFile) -> LoRAFile:
    """Return the file without the layers that PEFT has no module for on this model, of those that it takes a model to tell.

    They are logged.

    Args:
        model: the base.
        layers: all of its modules by name.
        file: the adapter, by the model's names.

    Raises:
        FileError: where none is left.
    """
    unmeant = in_order(
        n for n in file.unclear & file.factors.keys() if not _is_among_all(owner_of(model), layers.get(n), file)
    )
    if not unmeant:
        return file
    setting = "target_modules 'all-linear'" if is_all_linear(file.config) else "target_parameters"
    if len(unmeant) == len(file.factors):
        raise FileError(f"The adapter's settings ({setting}) mean none of its layers on this model: {shown(unmeant)}.")
    log.warning(
        "%d layers of the adapter are left out, as PEFT leaves them out: on this model %s does not mean %s.",
        len(unmeant), setting, shown(unmeant),
    )  # fmt: skip

    def kept(values: Mapping[str, T]) -> dict[str, T]:
        return {n: v for n, v in values.items() if n not in unmeant and n.rpartition(".")[0] not in unmeant}

    saved = {n: v for n, v in file.whole.items() if saved_module(n, file.config)}
    return replace(
        file, factors=kept(file.factors), scales=kept(file.scales), magnitudes=kept(file.magnitudes), biases=kept(file.biases),
        copies=kept(file.copies), whole=kept(file.whole) | saved,
    )  # fmt: skip


def _is_among_all(model: nn.Module, layer: nn.Module | None, file: LoRAFile) -> bool:
    """Return whether PEFT has a module for a layer of which its name does not tell it."""
    if layer is None:  # which is another problem
        return True
    if not is_all_linear(file.config):
        return not parameters_anywhere(file.config).isdisjoint(layer._parameters)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and file.config.task_type == "SEQ_CLS":
        head = next((h for n in ("score", "classifier") if (h := getattr(model, n, None)) is not None), None)
    return (isinstance(layer, nn.Linear) or isinstance(kind_of(layer), Conv1DKind)) and layer is not head


def without_effect_in_peft(name: str, layers: Mapping[str, nn.Module]) -> bool:
    """Return whether PEFT does not compute with the update of this layer of a file.

    That is so where the module around it only reads its weight. (PEFT calls an output projection inside its own wrapper of an
    `nn.MultiheadAttention`, which has another name.)
    """
    outer, _, last = name.rpartition(".")
    return outer in layers and only_read(layers[outer], last)


# PEFT's lists (0.21, tuners_utils.py): types of models, and layers that it refuses to adapt in them with LoRA
_MAMBAS, _REFUSED = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}, {"out_proj", "conv1d"}


def refused_by_peft(model: nn.Module, layers: Mapping[str, nn.Module], file: LoRAFile) -> dict[str, list[str]]:
    """Return why PEFT (0.21) does not load this adapter → the layers that are to blame; empty where it does.

    Args:
        model: the base.
        layers: all of its modules by name.
        file: the adapter, by the model's names.
    """
    kind = getattr(getattr(owner_of(model), "config", None), "model_type", None)
    reasons: dict[str, list[str]] = {}
    for name in in_order(file.factors):
        layer = layers.get(name)
        if kind in _MAMBAS and name.rpartition(".")[2] in _REFUSED:
            reasons.setdefault(f"it adapts no out_proj or conv1d of a {kind!r} model", []).append(name)
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups > 1:
            reasons.setdefault("its A and B of a convolution in groups have other shapes", []).append(name)
    return reasons


def unlike_in_peft(layer: nn.Module) -> str | None:
    """Say which settings of a convolution PEFT (0.21) leaves out of its update's own; None where it has all that matter."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    parts = []
    if any(d > 1 and k > 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)):
        parts.append(f"dilation {list(layer.dilation)}")
    if layer.padding_mode != "zeros" and any(layer._reversed_padding_repeated_twice):
        parts.append(f"padding mode {layer.padding_mode!r}")
    return f"with {' and '.join(parts)}, which PEFT leaves out of its update's own convolution" if parts else None
