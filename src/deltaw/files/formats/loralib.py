"""Checkpoints of loralib, the LoRA paper's own package. No model code.

They are pickled dicts with `<layer>.lora_A` [r, k] and `.lora_B` [d, r], and beside them what was trained whole: heads, biases.
They carry no α, no kinds of layers and no names of parts.

A MergedLinear is one layer for query, key and value, some of which have updates. It has its parts' A's and B's one under the
other, lora_A [r·parts, k] and lora_B [d/3·parts, r]. It computes exactly one update of the whole layer, of rank r·parts. The B of
that is zero outside of each part's own rows and columns. A ConvLoRA has lora_A [r·n, c·n] and lora_B [d·n, r·n] for kernels of
n×n. Their product is read as [d, c, n, n], one update of rank r·n². (Source: microsoft/LoRA, loralib/layers.py and utils.py.)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import FileError, shown
from deltaw.files.formats.peft.reading import named_tensors, unpickled
from deltaw.layers.kinds import Runs
from deltaw.layers.names import unwrapped

log = logging.getLogger("deltaw")

PARTS = ("q", "k", "v")
_PATTERN = re.compile(r"[01]+")
# GPT-2's masks, which loralib keeps for biases by their names
_MASK = re.compile(r"(?:.+\.)?attn\.(?:bias|masked_bias)")
# Names of modules that embed tokens or positions, where no base tells
_EMBEDDINGS = re.compile(r"(?:.+\.)?(?:wte|wpe|shared|embed_in|embed\w*|emb|\w*embeddings?)")


@dataclass
class Checkpoint:
    """The contents of a checkpoint, by the names of the base's layers."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer name → A [r, k], B [d, r] of the whole layer."""
    scales: dict[str, float] = field(default_factory=dict)
    """Layer name → α/r, r as loralib counts it."""
    slices: dict[str, dict[str, Runs]] = field(default_factory=dict)
    """Merged layer → its parts that have updates → their rows."""
    embeddings: set[str] = field(default_factory=set)
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Convolution → the shape of one kernel, [c, n, n]; its A is flat."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter → the value that was trained in its place."""


@dataclass(frozen=True)
class Layers:
    """The shapes and kinds of the base's layers, as far as they are known."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layer name → shape of its weight, [d, k] or [d, c, …]."""
    embeddings: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Source:
    """A checkpoint as it was read, and what was said of it."""

    pairs: Mapping[str, Mapping[str, Tensor]]
    """Layer name → "A" and "B", as far as they are there."""
    others: Mapping[str, Tensor]
    """Key → tensor, of all others."""
    alpha: float
    enabled: list[bool] | None
    """Parts of merged layers → they have updates; None where nobody says it."""
    layers: Layers | None
    """None: of an unknown base."""

    def shape(self, layer: str) -> tuple[int, ...] | None:
        """Return the shape of a layer's weight in the base, where that is known."""
        return None if self.layers is None else self.layers.shapes.get(layer)

    def embeds(self, layer: str) -> bool:
        """Return whether a layer is an embedding, by the base or else by its name."""
        return _EMBEDDINGS.fullmatch(layer) is not None if self.layers is None else layer in self.layers.embeddings

    def kernels(self, layer: str) -> tuple[int, ...] | None:
        """Return the shape of a convolution's weight, by the base or the checkpoint itself; None for other layers."""
        weight = self.others.get(f"{layer}.conv.weight", self.others.get(f"{layer}.weight"))
        shape = self.shape(layer) or (None if weight is None else tuple(weight.shape))
        return shape if shape is not None and len(shape) > 2 else None


def read(path: Path, *, alpha: float | None, parts: Sequence[str] = (), layers: Layers | None = None) -> Checkpoint:
    """Read and check a checkpoint. Nothing that a pickle could run is run.

    Args:
        path: the file.
        alpha: α that it was trained with.
        parts: those of q, k and v that merged layers have updates of; or a pattern of 0 and 1, a digit a part, as loralib's
            `enable_lora` is.
        layers: the base's, where it is known.

    Raises:
        FileError: with everything wrong: no α, an A without its B, shapes that fit no layer, parts that are not named, keys that
            are no parameters, a checkpoint that has the base's weights too.
    """
    source, checkpoint = _source(_state(path), alpha or 1.0, _enabled(parts), layers), Checkpoint()
    problems = [] if alpha else ["it carries no α: give the alpha (command line: --alpha) that it was trained with"]
    problems += [f"{p!r} is none of q, k, v, nor a pattern of 0 and 1" for p in parts if not _is_part(p)]
    problems += [] if source.pairs else ["there is no lora_A or lora_B in it"]
    for layer, pair in source.pairs.items():
        if missing := [part for part in "AB" if part not in pair]:
            problems.append(f"{layer} has no lora_{missing[0]}")
        elif why := _read_pair(source, layer, pair["A"], pair["B"], checkpoint):
            problems.append(f"{layer}: {why}")
    problems += _read_others(source, checkpoint)
    if problems:
        raise FileError(f"{path} cannot be converted:", problems)
    return checkpoint


def check_holds_adapter(path: Path) -> None:
    """Raise FileError for a file that is no checkpoint of loralib's, or one without an A and a B."""
    if not _source(_state(path), 1.0, None, None).pairs:
        raise FileError(f"{path} holds no lora_A or lora_B.")


def _is_part(part: str) -> bool:
    return part in PARTS or _PATTERN.fullmatch(part) is not None


def _enabled(parts: Sequence[str]) -> list[bool] | None:
    """Return which parts have updates; None where nobody says it."""
    if not parts:
        return None
    if len(parts) == 1 and _PATTERN.fullmatch(parts[0]):
        return [digit == "1" for digit in parts[0]]
    return [part in parts for part in PARTS]


def _state(path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's tensors, by names without what wrappers put into them. Raises FileError."""
    state = unpickled(path)
    for wrapper in ("model_state_dict", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    state = {unwrapped(key): tensor for key, tensor in named_tensors(state, path).items()}
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state


def _source(state: Mapping[str, Tensor], alpha: float, enabled: list[bool] | None, layers: Layers | None) -> _Source:
    """Return a checkpoint's A's and B's apart from its other tensors."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer, _, part = key.rpartition(".lora_")
        if layer and part in ("A", "B"):
            pairs.setdefault(layer, {})[part] = tensor
        else:
            others[key] = tensor
    return _Source(pairs, others, alpha, enabled, layers)


def _read_pair(source: _Source, layer: str, A: Tensor, B: Tensor, checkpoint: Checkpoint) -> str | None:
    """Put A and B of one layer into `checkpoint`, or say what is wrong."""
    if not (A.is_floating_point() and B.is_floating_point()):
        return f"A is {A.dtype} and B {B.dtype}; they must be floating point"
    no_layer = f"A is {list(A.shape)} and B {list(B.shape)}; they fit no layer of loralib's"
    if A.ndim != 2 or B.ndim != 2 or not B.shape[1] or not A.numel() or A.shape[0] % B.shape[1]:
        return no_layer
    kernels = source.kernels(layer)
    if kernels is not None:
        return _read_convolution(source, layer, A, B, kernels, checkpoint)
    r, count = B.shape[1], A.shape[0] // B.shape[1]
    enabled = _parts(source, layer, count, B)
    if isinstance(enabled, str):
        return enabled
    if B.shape[0] % count:
        return no_layer
    checkpoint.scales[layer] = source.alpha / r
    if enabled is None:
        checkpoint.factors[layer] = A, B
        if source.embeds(layer):
            checkpoint.embeddings.add(layer)
        return None
    height = B.shape[0] // count
    whole, runs = B.new_zeros(len(enabled) * height, r * count), dict[str, Runs]()
    for i, place in enumerate(place for place, on in enumerate(enabled) if on):
        start = place * height
        whole[start : start + height, i * r : (i + 1) * r] = B[i * height : (i + 1) * height]
        runs[PARTS[place] if len(enabled) == len(PARTS) else str(place)] = ((start, start + height),)
    checkpoint.factors[layer], checkpoint.slices[layer] = (A, whole), runs
    return None


def _parts(source: _Source, layer: str, count: int, B: Tensor) -> list[bool] | str | None:
    """Return which parts of a layer have updates, of which there are `count`; None for a layer that is not merged.

    A text says what is wrong.
    """
    shape, height = source.shape(layer), B.shape[0] // count
    if shape is not None and height:
        if B.shape[0] == shape[0] and count == 1:
            return None
        if shape[0] % height == 0 and shape[0] // height == count:
            return [True] * count
    enabled = source.enabled
    if count == 1 and (enabled is None or sum(enabled) != 1):
        return None
    if enabled is None and count == len(PARTS):
        return [True] * count
    if enabled is None or sum(enabled) != count:
        named = "none is named" if enabled is None else f"{sum(enabled)} are named"
        return (
            f"it has updates of {count} of its parts, of which {named}: give parts (command line: --parts), for example q,v, or "
            "a pattern with a digit a part, 101"
        )
    if shape is not None and len(enabled) * height != shape[0]:
        return f"{len(enabled)} parts of {height} rows are named, the base's layer has {shape[0]}"
    return enabled


def _read_convolution(
    source: _Source, layer: str, A: Tensor, B: Tensor, shape: tuple[int, ...], checkpoint: Checkpoint
) -> str | None:
    """Put A and B of a convolution into `checkpoint`, or say what is wrong.

    The product of B [d·n, R] and A [R, c·n], read as [d, c, …, n], is one B [d, n·R] and A [n·R, c·…·n].
    """
    d, n = shape[0], shape[-1]
    size, R = torch.Size(shape[1:]).numel(), A.shape[0]
    if B.shape[0] != d * n or B.shape[1] != R or R % n or n * A.shape[1] != size:
        return (
            f"A is {list(A.shape)} and B {list(B.shape)}, the weight {list(shape)}: only convolutions in one group with "
            "square kernels are converted"
        )
    whole = A.new_zeros(n * R, size)
    for i in range(n):
        whole[i * R : (i + 1) * R, i * A.shape[1] : (i + 1) * A.shape[1]] = A
    checkpoint.factors[layer] = whole, B.view(d, n, R).reshape(d, n * R)
    checkpoint.scales[layer] = source.alpha / (R // n)
    checkpoint.kernels[layer] = shape[1:]
    return None


def _read_others(source: _Source, checkpoint: Checkpoint) -> list[str]:
    """Put heads and biases that were trained into `checkpoint`, but no masks. Return what is wrong with the others."""
    problems = []
    masks = [key for key, tensor in source.others.items() if _MASK.fullmatch(key) and tensor.ndim != 1]
    if masks:
        log.warning("Left out, as masks and no parameters: %s.", shown(masks))
    for key, tensor in source.others.items():
        layer, _, name = key.rpartition(".")
        outer = layer.removesuffix(".conv")
        if key in masks or (outer in checkpoint.kernels and name == "weight"):
            continue
        if name == "bias" and outer in checkpoint.kernels:
            checkpoint.whole[f"{outer}.bias"] = tensor
        elif not tensor.is_floating_point():
            problems.append(f"{key} is {tensor.dtype} {list(tensor.shape)}, no parameter that could be trained")
        elif not layer:
            problems.append(f"{key} is no parameter of a module inside the model, which alone can be trained whole")
        elif name == "weight" and layer in source.pairs:
            problems.append(
                f"{key} is the base's own: this is a checkpoint of the whole model. Save lora_state_dict(model) and what was "
                "trained besides"
            )
        else:
            checkpoint.whole[key] = tensor
    return problems
