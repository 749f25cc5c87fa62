"""The names of the tensors in an adapter's file, sorted by what they are. No model code.

A's and B's of a stack of E matrices (a mixture's experts) are there as A [E·r, k], one under the other, and B [d, r·E], E running
fastest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltaw.layers.names import unwrapped, without_peft_prefix

PREFIX = "base_model.model."

# Of a low-rank update, some with the adapter's name behind them, as older versions wrote it
_PART = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?:[^.]+\.)?(?P<own>weight|bias)|\.[^.]+)?"
)
_ROWS = re.compile(r"(?P<layer>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_WHOLE = re.compile(r"\.modules_to_save(?:\.[^.]+(?=\.))?(?=\.)")
# PEFT's wrapper of a module in modules_to_save keeps the module that it copied
_ORIGINAL = ".original_module."
_PARTS = {
    "lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_magnitude_vector": "magnitude",
}  # fmt: skip


@dataclass
class Sorted:
    """All tensors of a file by what they are."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Layer name → "A", "B", "magnitude" and "bias" of its low-rank update, those that there are."""
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Convolution → what its A's kernels are [c, …]; its A and B are flat."""
    embeddings: set[str] = field(default_factory=set)
    """The layers of these whose A and B are an embedding's."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Layer name → rows of some tokens."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter → a value in its place."""
    copies: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter of a layer that has an update → the base's own value."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter of a module that has been copied to be trained → the value that it had before, or has."""
    wrapped: str | None = None
    """The first key with what torch.compile, DDP and their like put into it, which the names here are without."""
    unknown: list[str] = field(default_factory=list)
    """Keys that are none of these."""
    twice: list[tuple[str, str]] = field(default_factory=list)
    """Keys that mean the same tensor, with other values."""
    unused: list[str] = field(default_factory=list)
    """Layers whose update PEFT has, but does not compute with."""
    _keys: dict[tuple[int, str], str] = field(default_factory=dict)

    def put(self, where: dict[str, Tensor], name: str, key: str, tensor: Tensor) -> None:
        """Put a tensor in its place, unless another one is there."""
        if name in where and not (where[name].shape == tensor.shape and torch.equal(where[name], tensor)):
            self.twice.append((self._keys[id(where), name], key))
        where[name] = tensor
        self._keys[id(where), name] = key


def sort(tensors: Mapping[str, Tensor], *, biases: bool) -> Sorted:
    """By their keys; `biases` tells whether the biases of layers with an update are trained, or the base's."""
    found, inside, saved = Sorted(), dict[str, set[str]](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        name = unwrapped(without_peft_prefix(key))
        if name != key.removeprefix(PREFIX) and found.wrapped is None:
            found.wrapped = key
        if match := _PART.fullmatch(name):
            _put_part(found, key, match, tensor)
        elif match := _ROWS.fullmatch(name):
            found.put(found.rows, match["layer"], key, tensor)
        elif "lora_" in name or "." not in name:
            found.unknown.append(key)
        elif _ORIGINAL in name:
            found.originals[name.replace(_ORIGINAL, ".", 1)] = tensor
        elif ".base_layer." in name:
            plain = name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
            kept = found.whole if biases and name.endswith(".bias") else found.copies
            found.put(kept, plain, key, tensor)
            inside.setdefault(plain, set()).add(name.split(".base_layer.")[0])
        elif (plain := _WHOLE.sub("", name)) != name:
            found.put(saved, plain, key, tensor)
        else:
            found.put(found.whole, name, key, tensor)
    found.whole = saved | found.whole  # PEFT reads the plain name, where the file has both
    _leave_out_unused(found)
    for layer, parts in found.parts.items():
        _flatten(found, layer, parts)
    for name in [n for n, layers in inside.items() if not any(_is_wrapped(found, layer) for layer in layers)]:
        place = found.whole if name in found.whole else found.copies
        if name in place:
            found.originals[name] = place.pop(name)
    return found


def updated_layers(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, bool]]:
    """The layers that have an A → it, and whether it is no embedding's and no convolution's."""
    found = {}
    for key, tensor in tensors.items():
        match = _PART.fullmatch(unwrapped(without_peft_prefix(key)))
        if match is not None and _PARTS[match["part"]] == "A" and match["own"] != "bias":
            found[match["layer"]] = tensor, "embedding" not in match["part"] and tensor.ndim == 2
    return found


def layer_of(key: str) -> str | None:
    """The layer with a low-rank update that a key is of: its A, B and the like, or what PEFT's wrapper keeps of the base."""
    name = unwrapped(without_peft_prefix(key))
    if match := _PART.fullmatch(name):
        return match["layer"]
    return name.split(".base_layer.")[0] if ".base_layer." in name and ".token_adapter." not in name else None


def plain_name(key: str) -> str | None:
    """The base's own name of a parameter that a key has whole; None where the key is a wrapper's or an update's."""
    name = unwrapped(without_peft_prefix(key))
    inside = _ORIGINAL in name or ".base_layer." in name or _WHOLE.search(name) or _ROWS.fullmatch(name)
    return None if inside or "lora_" in name or "." not in name else name


def _leave_out_unused(found: Sorted) -> None:
    """PEFT wraps an `nn.MultiheadAttention` with its output projection inside. Where that is a target by itself too, a second
    update of it lies on the wrapper, which no pass reads, with a copy of the weight from some moment of the training."""
    for layer in list(found.parts):
        outer, _, own = layer.rpartition(".")
        of_a_stack = own == "base_layer"  # the next parameter of one module
        if not of_a_stack and outer in found.parts and f"{outer}.base_layer.{own}" in found.parts:
            del found.parts[layer]
            found.copies = {n: value for n, value in found.copies.items() if n.rpartition(".")[0] != layer}
            found.unused.append(layer)


def _is_wrapped(found: Sorted, layer: str) -> bool:
    """Whether PEFT, reading the file, has a wrapper around this layer: the file has something for the wrapper itself."""
    layer = layer.removesuffix(".token_adapter")
    return layer in found.rows or any(n == layer or n.startswith(f"{layer}.base_layer") for n in found.parts)


def _flatten(found: Sorted, layer: str, parts: dict[str, Tensor]) -> None:
    """A convolution's A [r, c, …], B [d, r, 1 …] and magnitude [1, d, 1 …] as those of a layer of patches."""
    A, B = parts.get("A"), parts.get("B")
    if A is None or B is None or A.ndim < 3 or A.ndim != B.ndim or B.shape[2:].numel() != 1:
        return
    found.kernels[layer] = tuple(A.shape[1:])
    parts |= {"A": A.flatten(1), "B": B.flatten(1)}
    if (magnitude := parts.get("magnitude")) is not None and magnitude.shape == (1, *B.shape[:1], *B.shape[2:]):
        parts["magnitude"] = magnitude.flatten()


def _put_part(found: Sorted, key: str, match: re.Match[str], tensor: Tensor) -> None:
    layer, part = match["layer"], _PARTS[match["part"]]
    if match["own"] == "bias":
        if part != "B":
            found.unknown.append(key)
            return
        part = "bias"
    if "embedding" in match["part"]:
        found.embeddings.add(layer)
    found.put(found.parts.setdefault(layer, {}), part, key, tensor)


def unstacked(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [E, r, k] and B [E, d, r] of the file's, r = `rank`."""
    return A.view(-1, rank, A.shape[1]), B.view(B.shape[0], rank, -1).permute(2, 0, 1).contiguous()


def transposed_in_file(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The file's A and B of the matrices' transposes: of (B_e A_e)ᵀ = A_eᵀ B_eᵀ."""
    if A.shape[0] % rank or B.shape[1] != A.shape[0]:
        return A, B  # of no stack
    A, B = unstacked(A, B, rank)
    return in_file(B.mT, A.mT)


def in_file(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The file's A and B of A [E, r, k] and B [E, d, r]; those of one matrix, A [r, k] and B [d, r], as they are."""
    if A.ndim == 2:
        return A, B
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
