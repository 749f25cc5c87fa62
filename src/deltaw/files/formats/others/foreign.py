"""An adapter of another program, by the names that transformers has for its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import FileError
from deltaw.files.formats.loralib import Layers
from deltaw.files.formats.peft.reading import named_tensors, unpickled
from deltaw.files.formats.safetensors import read_tensors
from deltaw.layers.tree import is_finite

Pair = tuple[Tensor, Tensor]


@dataclass
class Foreign:
    """The contents of another program's adapter."""

    origin: str
    """The program's name."""
    factors: dict[str, Pair] = field(default_factory=dict)
    """Layer name → A [r, k], B [d, r]."""
    scales: dict[str, float] = field(default_factory=dict)
    """Layer name → the factor of BA."""
    embeddings: set[str] = field(default_factory=set)
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Convolution → the shape of one kernel, [c, …]; its A is flat."""
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    """Layer name → DoRA's m [d]."""
    dropout: float = 0.0
    base: str | None = None
    """The base's name, where the file has it."""
    task: str | None = None
    """PEFT's name of the task."""
    ends: tuple[int, ...] = ()
    """Ids of the tokens that end what it was taught to say."""


def put(
    parts: dict[str, dict[str, Tensor]], layer: str, part: str, key: str, tensor: Tensor, problems: list[str]
) -> None:
    """Put a layer's part among the others. Where another key gave it already, say that in `problems` and keep that one."""
    if part in parts.setdefault(layer, {}):
        problems.append(f"{key}: another key in the file is the same part of {layer}")
    else:
        parts[layer][part] = tensor


def pairs_of(parts: Mapping[str, Mapping[str, Tensor]], problems: list[str]) -> dict[str, Pair]:
    """Return layer → A [r, k], B [d, r], of parts "A" and "B" by layers. Put what is wrong into `problems`."""
    pairs = {}
    for layer, of_layer in parts.items():
        missing = [part for part in "AB" if part not in of_layer]
        if missing:
            problems.append(f"{layer} has no {' and no '.join(missing)}")
        elif why := pair_problem(of_layer["A"], of_layer["B"]):
            problems.append(f"{layer}: {why}")
        else:
            pairs[layer] = of_layer["A"], of_layer["B"]
    return pairs


def pair_problem(A: Tensor, B: Tensor) -> str | None:
    """Say why two tensors are no A [r, k] and B [d, r]; None where they are."""
    if not (A.is_floating_point() and B.is_floating_point()):
        return f"A is {A.dtype} and B {B.dtype}; they must be floating point"
    if A.ndim != 2 or B.ndim != 2 or not A.numel() or not B.numel() or A.shape[0] != B.shape[1]:
        return f"A is {list(A.shape)} and B {list(B.shape)}; they must be [r, k] and [d, r]"
    infinite = [name for name, tensor in (("A", A), ("B", B)) if not is_finite(tensor)]
    return f"{' and '.join(infinite)} has values that are not finite (NaN or infinity)" if infinite else None


def rank_problems(file: str, rank: object, adapter: Foreign) -> list[str]:
    """Say that the tensors have another rank than their settings, which are then another adapter's."""
    ranks = sorted({A.shape[0] for A, _ in adapter.factors.values()})
    if not isinstance(rank, int) or not ranks or ranks == [rank]:
        return []
    of_tensors = " and ".join(map(str, ranks))
    return [f"{file}: the rank is {rank}, that of the tensors {of_tensors}: these are not of one adapter"]


def check_layers(layers: Layers, adapter: Foreign) -> list[str]:
    """List the layers of an adapter that a base lacks, or has in other shapes or as another kind of layer."""
    problems = []
    for layer, (A, B) in adapter.factors.items():
        shape = layers.shapes.get(layer)
        adapted = (A.shape[1], B.shape[0]) if layer in adapter.embeddings else (B.shape[0], *_inputs(adapter, layer, A))
        if shape is None:
            problems.append(f"{layer} is none of the base's layers")
        elif shape != adapted:
            problems.append(f"{layer} is {list(shape)} in the base, the adapter is of one that is {list(adapted)}")
        elif (layer in layers.embeddings) != (layer in adapter.embeddings):
            kinds = ["a dense layer", "an embedding"]
            of_base, of_adapter = layer in layers.embeddings, layer in adapter.embeddings
            problems.append(f"{layer} is {kinds[of_base]} in the base, the adapter's A and B are {kinds[of_adapter]}'s")
    return problems


def _inputs(adapter: Foreign, layer: str, A: Tensor) -> tuple[int, ...]:
    return adapter.kernels.get(layer, (A.shape[1],))


def read_any(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file or a pickle, in which nothing that could run is run, and the header's texts.

    A pickle may have its tensors one level down, under "model" or "state_dict". Raises FileError.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    state = unpickled(path)
    for outer in ("model", "state_dict", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(outer), Mapping):
            state = state[outer]
    return named_tensors(state, path), {}


def refuse(path: Path, problems: Iterable[str]) -> None:
    """Raise FileError with all problems, where there are some."""
    if listed := list(problems):
        raise FileError(f"{path} cannot be converted:", listed)


def scaled(B: Tensor, factor: float) -> Tensor:
    """Return B with a factor worked into it; B itself for 1."""
    if factor == 1.0:
        return B
    return (B.double() * factor).to(B.dtype if B.dtype in (torch.float32, torch.float64) else torch.float32)
