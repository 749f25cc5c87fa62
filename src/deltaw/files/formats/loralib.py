"""Checkpoints of loralib (the paper's own package): a pickled dict with `<layer>.lora_A` [r, k] and `.lora_B` [d, r], and beside
them what was trained whole: heads, biases. No model code.

They carry no α, no kinds of layers and no names of parts. A MergedLinear (one layer for query, key and value, some of which
have updates) has its parts' A's and B's one under the other, lora_A [r·parts, k] and lora_B [d/3·parts, r]. What it computes
is exactly one update of the whole layer, of rank r·parts, whose B is zero outside of each part's own rows and columns. A
ConvLoRA has lora_A [r·n, c·n] and lora_B [d·n, r·n] for kernels of n×n, whose product is read as [d, c, n, n]: one update of
rank r·n². (Source: microsoft/LoRA, loralib/layers.py and utils.py.)
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import FileError, first_line
from deltaw.layers.kinds import Runs
from deltaw.layers.names import unwrapped

log = logging.getLogger("deltaw")

PARTS = ("q", "k", "v")
_PATTERN = re.compile(r"[01]+")
# GPT-2's masks, which loralib keeps for biases by their names
_MASK = re.compile(r"(?:.+\.)?attn\.(?:bias|masked_bias)")
# How modules that embed tokens or positions are called, where no base says it
_EMBEDDINGS = re.compile(r"(?:.+\.)?(?:wte|wpe|shared|embed_in|embed\w*|emb|\w*embeddings?)")


@dataclass
class Checkpoint:
    """What a checkpoint of loralib holds, by the names of the base's layers."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer name → A [r, k], B [d, r] of the whole layer."""
    scales: dict[str, float] = field(default_factory=dict)
    """Layer name → α/r, r as loralib counts it."""
    slices: dict[str, dict[str, Runs]] = field(default_factory=dict)
    """Merged layer → its parts that have updates → their rows."""
    embeddings: set[str] = field(default_factory=set)
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Convolution → one of its kernels, [c, n, n]; its A is flat."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter → the value that was trained in its place."""


@dataclass(frozen=True)
class Layers:
    """What is known of the base's layers."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layer name → shape of its weight, [d, k] or [d, c, …]."""
    embeddings: frozenset[str] = frozenset()


def read(path: Path, *, alpha: float | None, parts: Sequence[str] = (), layers: Layers | None = None) -> Checkpoint:
    """`parts` are those of q, k and v that merged layers have updates of, or a pattern of 0 and 1 with a digit a part, as
    loralib's `enable_lora` is. `layers`: of the base, where it is known.

    Nothing that a pickle could run is run. Raises FileError with everything wrong: no α, an A without its B, shapes that fit no
    layer, parts that are not named, keys that are no parameters, a checkpoint that has the base's weights too."""
    reading = _Reading(_load(path), alpha or 1.0, _enabled(parts), layers)
    problems = ["it carries no α: give the alpha that it was trained with"] * (alpha is None)
    problems += [f"{p!r} is none of q, k, v, nor a pattern of 0 and 1" for p in parts if not _is_part(p)]
    reading.go()
    problems += reading.problems
    if problems:
        raise FileError(f"{path} cannot be converted:", problems)
    return reading.found


def _is_part(part: str) -> bool:
    return part in PARTS or _PATTERN.fullmatch(part) is not None


def _enabled(parts: Sequence[str]) -> list[bool] | None:
    """Which parts have updates; None where nobody says it."""
    if not parts:
        return None
    if len(parts) == 1 and _PATTERN.fullmatch(parts[0]):
        return [digit == "1" for digit in parts[0]]
    return [part in parts for part in PARTS]


def _load(path: Path) -> Mapping[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise FileError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from error
    for wrapper in ("model_state_dict", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise FileError(f"{path} holds a {type(state).__name__}, not a dict of tensors.")
    state = {unwrapped(str(key)): tensor for key, tensor in state.items()}
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state


class _Reading:
    """What has been found so far, and what was wrong."""

    def __init__(
        self, state: Mapping[str, Tensor], alpha: float, enabled: list[bool] | None, layers: Layers | None
    ) -> None:
        self.alpha, self.enabled, self.layers = alpha, enabled, layers or Layers()
        self.known = layers is not None
        self.found, self.problems = Checkpoint(), list[str]()
        self.pairs: dict[str, dict[str, Tensor]] = {}
        self.others: dict[str, Tensor] = {}
        for key, tensor in state.items():
            layer, _, part = key.rpartition(".lora_")
            if layer and part in ("A", "B"):
                self.pairs.setdefault(layer, {})[part] = tensor
            else:
                self.others[key] = tensor

    def go(self) -> None:
        if not self.pairs:
            self.problems.append("there is no lora_A or lora_B in it")
        for layer, pair in self.pairs.items():
            missing = [part for part in "AB" if part not in pair]
            if missing:
                self.problems.append(f"{layer} has no lora_{missing[0]}")
            elif why := self._pair(layer, pair["A"], pair["B"]):
                self.problems.append(f"{layer}: {why}")
        self._whole()

    def _pair(self, layer: str, A: Tensor, B: Tensor) -> str | None:
        """Keep A and B of one layer, or say what is wrong."""
        if not (A.is_floating_point() and B.is_floating_point()):
            return f"A is {A.dtype} and B {B.dtype}; they must be floating point"
        no_layer = f"A is {list(A.shape)} and B {list(B.shape)}; they fit no layer of loralib's"
        if A.ndim != 2 or B.ndim != 2 or not B.shape[1] or not A.numel() or A.shape[0] % B.shape[1]:
            return no_layer
        shape = self._kernel_shape(layer)
        if shape is not None:
            return self._convolution(layer, A, B, shape)
        r, count = B.shape[1], A.shape[0] // B.shape[1]
        enabled = self._parts(layer, count, B)
        if isinstance(enabled, str):
            return enabled
        if B.shape[0] % count:
            return no_layer
        self.found.scales[layer] = self.alpha / r
        if enabled is None:
            self.found.factors[layer] = A, B
            if self._embeds(layer):
                self.found.embeddings.add(layer)
            return None
        height = B.shape[0] // count
        whole, runs = B.new_zeros(len(enabled) * height, r * count), dict[str, Runs]()
        for i, place in enumerate(place for place, on in enumerate(enabled) if on):
            start = place * height
            whole[start : start + height, i * r : (i + 1) * r] = B[i * height : (i + 1) * height]
            runs[PARTS[place] if len(enabled) == len(PARTS) else str(place)] = ((start, start + height),)
        self.found.factors[layer], self.found.slices[layer] = (A, whole), runs
        return None

    def _parts(self, layer: str, count: int, B: Tensor) -> list[bool] | str | None:
        """Which parts of a layer have updates, of which there are `count`; None for a layer that is not merged; or what is
        wrong."""
        shape, height = self.layers.shapes.get(layer), B.shape[0] // count
        if shape is not None and height:
            if B.shape[0] == shape[0] and count == 1:
                return None
            if shape[0] % height == 0 and shape[0] // height == count:
                return [True] * count
        enabled = self.enabled
        if count == 1 and (enabled is None or sum(enabled) != 1):
            return None
        if enabled is None and count == len(PARTS):
            return [True] * count
        if enabled is None or sum(enabled) != count:
            named = "none is named" if enabled is None else f"{sum(enabled)} are named"
            return (
                f"it has updates of {count} of its parts, of which {named}: give parts, for example q,v, or a pattern with a "
                "digit a part, 101"
            )
        if shape is not None and len(enabled) * height != shape[0]:
            return f"{len(enabled)} parts of {height} rows are named, the base's layer has {shape[0]}"
        return enabled

    def _embeds(self, layer: str) -> bool:
        if self.known:
            return layer in self.layers.embeddings
        return _EMBEDDINGS.fullmatch(layer) is not None

    def _kernel_shape(self, layer: str) -> tuple[int, ...] | None:
        """The shape of a convolution's weight, by the base or the checkpoint itself."""
        own = self.others.get(f"{layer}.conv.weight", self.others.get(f"{layer}.weight"))
        shape = self.layers.shapes.get(layer, None if own is None else tuple(own.shape))
        return shape if shape is not None and len(shape) > 2 else None

    def _convolution(self, layer: str, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> str | None:
        """The product of B [d·n, R] and A [R, c·n], read as [d, c, …, n], as one B [d, n·R] and A [n·R, c·…·n]."""
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
        self.found.factors[layer] = whole, B.view(d, n, R).reshape(d, n * R)
        self.found.scales[layer] = self.alpha / (R // n)
        self.found.kernels[layer] = shape[1:]
        return None

    def _whole(self) -> None:
        """What is neither A nor B: heads and biases that were trained; not masks, nor the base's own weights."""
        masks = [key for key, t in self.others.items() if _MASK.fullmatch(key) and t.ndim != 1]
        if masks:
            log.warning("Left out, as masks and no parameters: %s.", ", ".join(masks[:3]) + (" …" if masks[3:] else ""))
        for key, tensor in self.others.items():
            layer, _, own = key.rpartition(".")
            if key in masks or (layer.removesuffix(".conv") in self.found.kernels and own == "weight"):
                continue
            if own == "bias" and (outer := layer.removesuffix(".conv")) in self.found.kernels:
                self.found.whole[f"{outer}.bias"] = tensor
            elif not tensor.is_floating_point():
                self.problems.append(
                    f"{key} is {tensor.dtype} {list(tensor.shape)}, no parameter that could be trained"
                )
            elif not layer:
                self.problems.append(
                    f"{key} is no parameter of a module inside the model, which alone can be trained whole"
                )
            elif own == "weight" and layer in self.pairs:
                self.problems.append(
                    f"{key} is the base's own: this is a checkpoint of the whole model. Save lora_state_dict(model) and what was "
                    "trained besides"
                )
            else:
                self.found.whole[key] = tensor
