"""Adapters of single experts, as transformers 4 had them, made into updates of the stacks that these are now. Knows one module at
a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import FileError, listing
from deltaw.files.peft import LoRAFile
from deltaw.files.peft_config import exactly
from deltaw.files.stacks import in_file
from deltaw.layers.kinds import Weight, weights_of
from deltaw.layers.ops.merging import times
from deltaw.renames import Renaming

log = logging.getLogger("deltaw")

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
        raise FileError(
            listing("The adapter has updates of single experts that do not make up this model's stacks:", problems)
        )
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
