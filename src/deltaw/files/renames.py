"""An adapter's file by the names of this model's layers.

Other versions of transformers and wrappers give layers other names; transformers 4 had single experts where there are stacks now.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deltaw.errors import FileError
from deltaw.files.formats.method_file import MethodFile
from deltaw.files.formats.peft import SLICES, LoRAFile, slices_of
from deltaw.files.formats.peft_config import exactly
from deltaw.files.formats.peft_keys import in_file
from deltaw.layers.kinds import Weight, weights_of
from deltaw.layers.names import (
    common_prefix,
    found_as,
    other_names,
    plain_names,
    unwrapped,
    unwrapped_pattern,
    without_peft_prefix,
)
from deltaw.layers.ops.merging import times

log = logging.getLogger("deltaw")

T = TypeVar("T")


def renamed(file: LoRAFile, known: Collection[str]) -> LoRAFile:
    """The file with this model's names (`known`: of its modules) for those layers that go by another one here: without what
    wrappers put into names, or by another version of transformers. It logs which. Raises FileError for two names of one."""
    if not file.wrapped and all(layer in known for layer in file.factors) and not (file.whole or file.rows):
        return file
    names = [*file.factors, *file.rows, *(name.rpartition(".")[0] for name in file.whole)]
    found = Renaming(known, file.wrapped, [name.partition(".base_layer")[0] for name in names])
    module, parameter = found.module, found.parameter
    made = replace(
        file,
        factors=_by(module, file.factors), scales=_by(module, file.scales), magnitudes=_by(module, file.magnitudes),
        biases=_by(module, file.biases), rows=_by(module, file.rows), whole=_by(parameter, file.whole),
        copies=_by(parameter, file.copies), originals=_by(parameter, file.originals),
        embeddings=frozenset(map(module, file.embeddings)), kernels=_by(module, file.kernels), metadata=_metadata(module, file),
        wrapped=None, unclear=frozenset(map(module, file.unclear)),
    )  # fmt: skip
    found.log()
    return made


def renamed_method(file: MethodFile, known: Collection[str]) -> MethodFile:
    """`renamed`, of an adapter of another method: its tensors, and the layers that its settings name."""
    found = Renaming(known, None, [])

    def tensor(name: str) -> str:
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            if (new := found.known_as(".".join(parts[:cut]))) is not None:
                return ".".join([new, *parts[cut:]])
        return name

    def settings(value: Any) -> Any:
        if isinstance(value, list):
            return [settings(inner) for inner in value]
        return (found.known_as(value) if isinstance(value, str) and "." in value else None) or value

    made = replace(
        file, tensors=_by(tensor, file.tensors), inputs=frozenset(found.known_as(n) or n for n in file.inputs),
        settings={key: settings(value) for key, value in file.settings.items()},
    )  # fmt: skip
    found.log()
    return made


def plainly_named_method(file: MethodFile) -> MethodFile:
    """`plainly_named`, of an adapter of another method."""
    return replace(
        file, tensors=_by(unwrapped, file.tensors), inputs=frozenset(map(unwrapped, file.inputs)),
        settings=_without_wrappers(file.settings), config=_without_wrappers(file.config),
        metadata=_without_wrappers(file.metadata),
    )  # fmt: skip


def plainly_named(file: LoRAFile) -> LoRAFile:
    """The file of a model that has wrappers inside, by the names that its modules have without them."""
    names = [*file.factors, *file.rows, *file.whole, *file.copies]
    if all(unwrapped(name) == name for name in names):
        return file
    return replace(
        file,
        factors=_by(unwrapped, file.factors), scales=_by(unwrapped, file.scales), magnitudes=_by(unwrapped, file.magnitudes),
        biases=_by(unwrapped, file.biases), rows=_by(unwrapped, file.rows), whole=_by(unwrapped, file.whole),
        copies=_by(unwrapped, file.copies), embeddings=frozenset(map(unwrapped, file.embeddings)),
        kernels=_by(unwrapped, file.kernels), config=_without_wrappers(file.config), metadata=_without_wrappers(file.metadata),
    )  # fmt: skip


def _without_wrappers(value: Any) -> Any:
    """Settings with names and patterns of names in them."""
    if isinstance(value, Mapping):
        return {_without_wrappers(key): _without_wrappers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_wrappers(inner) for inner in value]
    return unwrapped_pattern(value) if isinstance(value, str) else value


class Renaming:
    """This model's names (`known`) of the modules that a file names, and which of them are others."""

    def __init__(self, known: Collection[str], wrapped: str | None, names: Sequence[str]) -> None:
        self.known, self.plain = known, plain_names(known)
        self.wrapped = {} if wrapped is None else {wrapped: unwrapped(without_peft_prefix(wrapped))}
        self.other: dict[str, str] = {}
        self.outer = common_prefix(names, known, self.plain)

    def module(self, name: str) -> str:
        """This model's name of a module, or of a part of PEFT's wrapper around one; the name itself where it has none."""
        outer, inside, part = name.partition(".base_layer")
        new = self.known_as(outer)
        if new is None and not inside:  # a parameter that has no layer
            outer, inside, part = name.rpartition(".")
            new = self.known_as(outer) if outer else None
        return name if new is None else f"{new}{inside}{part}"

    def known_as(self, name: str) -> str | None:
        """This model's name of a module; None where it has none."""
        new = found_as(name.removeprefix(self.outer), self.known, self.plain)
        if new is not None:
            if new != name:
                self.wrapped[name] = new
            return new
        places = (
            place
            for other in other_names(unwrapped(name.removeprefix(self.outer)))
            if (place := found_as(other, self.known, self.plain)) is not None
        )
        new = next(places, None)
        if new is not None:
            self.other[name] = new
        return new

    def parameter(self, name: str) -> str:
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
                len(self.other),
                old,
                new,
            )


def _metadata(module: Callable[[str], str], file: LoRAFile) -> dict[str, str]:
    """With the names of the layers that have slices."""
    slices = slices_of(file)
    return {**file.metadata, SLICES: json.dumps(_by(module, slices))} if slices else file.metadata


def _by(new: Callable[[str], str], values: Mapping[str, T]) -> dict[str, T]:
    """Values by new names. Raises FileError for names that become one."""
    names: dict[str, list[str]] = {}
    for name in values:
        names.setdefault(new(name), []).append(name)
    twice = [
        f"{' and '.join(map(repr, old))} are {name!r} in this model" for name, old in names.items() if len(old) > 1
    ]
    if twice:
        raise FileError("The adapter's file has two updates of one layer:", twice)
    return {name: values[old[0]] for name, old in names.items()}


# A dense layer of one expert; Mixtral's w1, w3 and w2 are others' gate_proj, up_proj and down_proj
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<own>w1|w2|w3|gate_proj|up_proj|down_proj)")
# Parameter of a stack → the layers of an expert whose rows it has, one below the other
_PARTS = {"gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")), "down_proj": (("w2", "down_proj"),)}


@dataclass(frozen=True)
class _Stack:
    """One stack's update."""

    pair: tuple[Tensor, Tensor]
    """A and B, as files have them."""
    scale: float
    rank: int
    """Of each of its matrices."""


def stacked(file: LoRAFile, layers: Mapping[str, Any]) -> LoRAFile:
    """The file with one update for each stack of experts that the model's `layers` have in place of single ones. A stack of two
    layers' rows gets the rank of both together, as PEFT (0.21) makes it: A's one below the other, B's in blocks. Raises FileError
    with every expert that is missing, or has another rank."""
    single: dict[tuple[str, str], dict[tuple[int, int], str]] = {}
    renaming = Renaming(layers, None, [])
    for layer in file.factors:
        match = _EXPERT.fullmatch(layer)
        module = None if match is None or layer in layers else _stack_for(renaming.known_as(match["experts"]), layers)
        if match is None or module is None:
            continue
        for parameter, parts in _PARTS.items():
            for place, names in enumerate(parts):
                if match["own"] in names:
                    single.setdefault((module, parameter), {})[int(match["number"]), place] = layer
    if not single:
        return file
    problems: list[str] = []
    made = {
        f"{module}.{own}": _one(file, layers[module], own, those, problems) for (module, own), those in single.items()
    }
    if problems:
        raise FileError("The adapter has updates of single experts that do not make up this model's stacks:", problems)
    renaming.log()
    if file.config.get("use_rslora"):
        log.warning(
            "Single experts are read with the scale α/√r that rsLoRA trained them with; "
            "PEFT (0.21) would give their gate_up_proj √2 times that."
        )
    gone = {name for those in single.values() for name in those.values()}
    return _with(file, gone, {name: stack for name, stack in made.items() if stack is not None})


def _stack_for(name: str | None, layers: Mapping[str, nn.Module]) -> str | None:
    """The name of a module, where that has experts in stacks."""
    stacks = name is not None and set(_PARTS) <= set(weights_of(layers[name]))
    return name if name is not None and stacks and not Weight(layers[name], "down_proj").transposed else None


def _one(
    file: LoRAFile, module: Any, own: str, those: Mapping[tuple[int, int], str], problems: list[str]
) -> _Stack | None:
    """The update of one stack, n layers' rows below each other: A [E·n·r, k] and B [d, n·r·E], as files have them."""
    first = next(iter(those.values()))
    wanted = [(e, part) for e in range(len(module._parameters[own])) for part in range(len(_PARTS[own]))]
    missing = [f"{first}: there is none of expert {e}, part {part}" for e, part in wanted if (e, part) not in those]
    missing += [f"{name}: there is no expert {e}" for (e, part), name in those.items() if (e, part) not in wanted]
    beyond = [
        f"{n}: DoRA's magnitude or a bias has no place in a stack"
        for n in those.values()
        if n in file.magnitudes | file.biases
    ]
    shapes = {tuple(t.shape) for name in those.values() for t in file.factors[name]}
    if len(shapes) > 2:
        missing.append(f"{first} and the other experts have A's and B's of different shapes ({sorted(shapes)})")
    problems += missing + beyond
    if missing or beyond:
        return None
    scale = file.scales[first]
    As, Bs = [], []
    for e in range(len(module._parameters[own])):
        names = [those[e, part] for part in range(len(_PARTS[own]))]
        As.append(torch.cat([file.factors[n][0] for n in names]))
        Bs.append(torch.block_diag(*(times(file.factors[n][1], file.scales[n] / scale) for n in names)))
    return _Stack(in_file(torch.stack(As), torch.stack(Bs)), scale, rank=len(As[0]))


def _with(file: LoRAFile, gone: set[str], made: Mapping[str, _Stack]) -> LoRAFile:
    """The file with these updates in the place of those that are `gone`."""
    factors = {n: pair for n, pair in file.factors.items() if n not in gone}
    factors |= {n: stack.pair for n, stack in made.items()}
    scales = {n: s for n, s in file.scales.items() if n not in gone} | {n: stack.scale for n, stack in made.items()}
    ranks = {exactly(n): stack.rank for n, stack in made.items()}
    config = file.config | {"rank_pattern": ranks | dict(file.config.get("rank_pattern") or {})}
    return replace(file, factors=factors, scales=scales, config=config)
