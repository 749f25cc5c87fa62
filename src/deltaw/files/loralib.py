"""Checkpoints of loralib (the paper's own package): a pickled dict with `<layer>.lora_A` [r, k] and `.lora_B` [d, r]. No
model code.

They carry no α and no names of parts: both are asked for. A MergedLinear (one layer for query, key and value, some of which
have updates) has its parts' A's and B's one under the other, lora_A [r·parts, k] and lora_B [d/3·parts, r]. What it computes
is exactly one update of the whole layer, of rank r·parts, whose B is zero outside of each part's own rows and columns.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import FileError, listing

PARTS = ("q", "k", "v")


def read(
    path: Path, *, alpha: float | None, parts: Sequence[str] = ()
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Layer name → (A [r, k], B [d, r]), and layer name → scale α/r. `parts` are those of q, k and v that merged layers have
    updates of.

    Nothing that a pickle could run is run. Raises FileError with everything wrong: no α, keys that are no update (biases, heads),
    an A without its B, shapes that fit no layer, parts that are not named."""
    state = _load(path)
    problems = ["it carries no α: give the alpha that it was trained with"] * (alpha is None)
    problems += [f"{p!r} is none of q, k, v" for p in parts if p not in PARTS]
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        layer, _, part = key.removeprefix("module.").rpartition(".lora_")
        if layer and part in ("A", "B"):
            pairs.setdefault(layer, {})[part] = tensor
        else:
            problems.append(f"{key} is no A or B; biases and heads cannot be converted")
    if not pairs:
        problems.append("there is no lora_A or lora_B in it")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[str, int] = {}
    for layer, pair in pairs.items():
        if len(pair) < 2:
            problems.append(f"{layer} has no lora_{'B' if 'A' in pair else 'A'}")
            continue
        found = _factors(layer, pair["A"], pair["B"], [p for p in PARTS if p in parts])
        if isinstance(found, str):
            problems.append(found)
        else:
            factors[layer], ranks[layer] = found, pair["B"].shape[1]
    if problems or alpha is None:
        raise FileError(listing(f"{path} cannot be converted:", problems))
    return factors, {layer: alpha / r for layer, r in ranks.items()}


def _load(path: Path) -> Mapping[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise FileError(f"{path} cannot be read as a checkpoint of tensors: {error}") from error
    for wrapper in ("model_state_dict", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise FileError(f"{path} holds a {type(state).__name__}, not a dict of tensors.")
    return state


def _factors(layer: str, A: Tensor, B: Tensor, parts: list[str]) -> tuple[Tensor, Tensor] | str:
    """A and B of the whole layer, or what is wrong."""
    if A.ndim != 2 or B.ndim != 2 or not B.shape[1] or A.shape[0] % B.shape[1]:
        return f"{layer}: A is {list(A.shape)} and B {list(B.shape)}; they fit no layer of loralib's"
    r = B.shape[1]
    count = A.shape[0] // r
    if count == 1 and len(parts) != 1:
        return A, B
    if count > len(PARTS) or B.shape[0] % count:
        return f"{layer}: A is {list(A.shape)} and B {list(B.shape)}; they fit no layer of loralib's"
    if count == len(PARTS):
        parts = list(PARTS)
    if len(parts) != count:
        named = f"{', '.join(parts)} are named" if parts else "none is named"
        return f"{layer} has updates of {count} of q, k, v, of which {named}: give parts, q,v say"
    height = B.shape[0] // count
    whole = B.new_zeros(len(PARTS) * height, r * count)
    for i, part in enumerate(parts):
        row = PARTS.index(part) * height
        whole[row : row + height, i * r : (i + 1) * r] = B[i * height : (i + 1) * height]
    return A, whole
