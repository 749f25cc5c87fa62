"""The names of the tensors in an adapter's file: sorted by what they are, and named again. No model code.

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

# Keys of a low-rank update, some with the adapter's name behind them, as older versions wrote it
_PART = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?:[^.]+\.)?(?P<parameter>weight|bias)|\.[^.]+)?"
)
_ROWS = re.compile(r"(?P<layer>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_COPY = re.compile(r"\.modules_to_save(?:\.[^.]+(?=\.))?(?=\.)")
# PEFT's wrapper of a module in modules_to_save keeps the module that it copied
_ORIGINAL = ".original_module."
_PARTS = {
    "lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_magnitude_vector": "magnitude",
}  # fmt: skip


@dataclass
class Sorted:
    """All tensors of a file by what they are."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Layer name → "A", "B", "magnitude" and "bias" of its low-rank update, as far as they are there."""
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Convolution → the shape of its A's kernels, [c, …]; its A and B are flat."""
    embeddings: set[str] = field(default_factory=set)
    """The layers whose A and B are an embedding's."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Layer name → rows [n, e] of some tokens."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter → a value in its place."""
    copies: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter of a layer that has an update → the base's own value."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter of a module that has been copied to be trained → the value that it had before, or has."""
    wrapped: str | None = None
    """The first key with the parts that torch.compile, DDP and their like put into names. All names here are without them."""
    unknown: list[str] = field(default_factory=list)
    """Keys that are none of these."""
    twice: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of keys that mean the same tensor, with different values."""
    unused: list[str] = field(default_factory=list)
    """Layers whose update PEFT has, but does not compute with."""
    _keys: dict[tuple[int, str], str] = field(default_factory=dict)

    def put(self, where: dict[str, Tensor], name: str, key: str, tensor: Tensor) -> None:
        """Put a tensor in its place, and note where another one is there."""
        if name in where and not (where[name].shape == tensor.shape and torch.equal(where[name], tensor)):
            self.twice.append((self._keys[id(where), name], key))
        where[name] = tensor
        self._keys[id(where), name] = key


def sort(tensors: Mapping[str, Tensor], *, biases: bool) -> Sorted:
    """Sort tensors by their keys. `biases`: the biases of layers with an update are trained ones, not the base's."""
    result, inside, saved = Sorted(), dict[str, set[str]](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        name = unwrapped(without_peft_prefix(key))
        if name != key.removeprefix(PREFIX) and result.wrapped is None:
            result.wrapped = key
        if match := _PART.fullmatch(name):
            _put_part(result, key, match, tensor)
        elif match := _ROWS.fullmatch(name):
            result.put(result.rows, match["layer"], key, tensor)
        elif "lora_" in name or "." not in name:
            result.unknown.append(key)
        elif _ORIGINAL in name:
            result.originals[name.replace(_ORIGINAL, ".", 1)] = tensor
        elif ".base_layer." in name:
            plain = name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
            place = result.whole if biases and name.endswith(".bias") else result.copies
            result.put(place, plain, key, tensor)
            inside.setdefault(plain, set()).add(name.split(".base_layer.")[0])
        elif (plain := without_copy(name)) != name:
            result.put(saved, plain, key, tensor)
        else:
            result.put(result.whole, name, key, tensor)
    result.whole = saved | result.whole  # PEFT reads the plain name, where the file has both
    _leave_out_unused(result)
    for layer, parts in result.parts.items():
        _flatten(result, layer, parts)
    for name in [n for n, layers in inside.items() if not any(_is_wrapped(result, layer) for layer in layers)]:
        place = result.whole if name in result.whole else result.copies
        if name in place:
            result.originals[name] = place.pop(name)
    return result


def updated_layers(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, bool]]:
    """Return the layers that have an A → it, and whether it is no embedding's and no convolution's."""
    layers = {}
    for key, tensor in tensors.items():
        match = _PART.fullmatch(unwrapped(without_peft_prefix(key)))
        if match is not None and _PARTS[match["part"]] == "A" and match["parameter"] != "bias":
            layers[match["layer"]] = tensor, "embedding" not in match["part"] and tensor.ndim == 2
    return layers


def layer_of(key: str) -> str | None:
    """Return the layer whose low-rank update, or whose copy in PEFT's wrapper, a key belongs to; None for other keys."""
    name = unwrapped(without_peft_prefix(key))
    if match := _PART.fullmatch(name):
        return match["layer"]
    return name.split(".base_layer.")[0] if ".base_layer." in name and ".token_adapter." not in name else None


def plain_name(key: str) -> str | None:
    """Return the base's own name of a parameter that a key has whole; None where the key is a wrapper's or an update's."""
    name = unwrapped(without_peft_prefix(key))
    inside = _ORIGINAL in name or ".base_layer." in name or _COPY.search(name) or _ROWS.fullmatch(name)
    return None if inside or "lora_" in name or "." not in name else name


def without_copy(name: str) -> str:
    """Return a name without the part that PEFT puts into those of modules in modules_to_save."""
    return _COPY.sub("", name)


def _leave_out_unused(result: Sorted) -> None:
    """Leave out the second update of an attention's output projection.

    PEFT wraps an `nn.MultiheadAttention` with its output projection inside. Where that is a target by itself too, a second
    update of it lies on the wrapper. No pass reads that, nor the copy of the weight beside it.
    """
    for layer in list(result.parts):
        outer, _, last = layer.rpartition(".")
        of_a_stack = last == "base_layer"  # the next parameter of one module
        if not of_a_stack and outer in result.parts and f"{outer}.base_layer.{last}" in result.parts:
            del result.parts[layer]
            result.copies = {n: value for n, value in result.copies.items() if n.rpartition(".")[0] != layer}
            result.unused.append(layer)


def _is_wrapped(result: Sorted, layer: str) -> bool:
    """Return whether the file has something for a wrapper around this layer, so that PEFT makes one."""
    layer = layer.removesuffix(".token_adapter")
    return layer in result.rows or any(n == layer or n.startswith(f"{layer}.base_layer") for n in result.parts)


def _flatten(result: Sorted, layer: str, parts: dict[str, Tensor]) -> None:
    """Make of a convolution's A [r, c, …], B [d, r, 1 …] and magnitude [1, d, 1 …] those of a dense layer of its patches."""
    A, B = parts.get("A"), parts.get("B")
    if A is None or B is None or A.ndim < 3 or A.ndim != B.ndim or B.shape[2:].numel() != 1:
        return
    result.kernels[layer] = tuple(A.shape[1:])
    parts |= {"A": A.flatten(1), "B": B.flatten(1)}
    if (magnitude := parts.get("magnitude")) is not None and magnitude.shape == (1, *B.shape[:1], *B.shape[2:]):
        parts["magnitude"] = magnitude.flatten()


def _put_part(result: Sorted, key: str, match: re.Match[str], tensor: Tensor) -> None:
    """Put a tensor of a low-rank update in its place."""
    layer, part = match["layer"], _PARTS[match["part"]]
    if match["parameter"] == "bias":
        if part != "B":
            result.unknown.append(key)
            return
        part = "bias"
    if "embedding" in match["part"]:
        result.embeddings.add(layer)
    result.put(result.parts.setdefault(layer, {}), part, key, tensor)


# --- stacks -----------------------------------------------------------------------------------------------------


def unstacked(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [E, r, k] and B [E, d, r], r = `rank`, of the file's A [E·r, k] and B [d, r·E]."""
    return A.view(-1, rank, A.shape[1]), B.view(B.shape[0], rank, -1).permute(2, 0, 1).contiguous()


def transposed_in_file(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the file's A and B for the transposes of its matrices, (B_e A_e)ᵀ = A_eᵀ B_eᵀ."""
    if A.shape[0] % rank or B.shape[1] != A.shape[0]:
        return A, B  # of no stack
    A, B = unstacked(A, B, rank)
    return in_file(B.mT, A.mT)


def in_file(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the file's A and B of A [E, r, k] and B [E, d, r]; those of one matrix, A [r, k] and B [d, r], as they are."""
    if A.ndim == 2:
        return A, B
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
