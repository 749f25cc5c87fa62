"""llama.cpp's GGUF files ↔ PEFT's folder, by the names of a base's layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from deltaw.errors import ConfigError, FileError, shown
from deltaw.files.convert.base import base_config, layers_of, without_weights
from deltaw.files.convert.places import as_folder, check_is_adapter
from deltaw.files.formats import gguf, peft
from deltaw.files.formats.gguf import GGUFLoRA
from deltaw.files.formats.loralib import Layers
from deltaw.files.formats.others import Foreign
from deltaw.files.formats.others.foreign import check_layers, refuse
from deltaw.files.formats.peft.metadata import base_in
from deltaw.layers.kinds import kind_of
from deltaw.layers.names import found_as, in_order

# model_type of transformers → llama.cpp's architecture, and whether it stores the rows of q and k in another order. Those that
# are not here store some weight in a way that has not been checked against llama.cpp's own conversion
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip


def to_gguf(src: Path, dst: Path, base: str | Path | nn.Module | None) -> Path:
    """Write a PEFT folder as a GGUF file."""
    check_is_adapter(dst, lambda: gguf.read(dst))
    file = peft.read(src)
    if others := file.beyond():
        raise FileError(
            f"A GGUF adapter holds A and B of dense layers alone; {src} has more:",
            [f"{what} of {shown(in_order(layers), 4)}" for what, layers in others.items()],
            "deltaw export writes a whole model as GGUF, with all of it merged.",
        )
    arch, names, shapes, reorder = names_of(base or base_in(file.metadata, file.config.base_model_name_or_path))
    layers = {layer: found_as(layer, names, {}) for layer in file.factors}
    unknown = [layer for layer, name in layers.items() if name is None]
    if unknown:
        raise FileError(f"llama.cpp has no tensor for these layers of {src}:", unknown)
    tensors = {layer: names[name] for layer, name in layers.items() if name is not None}
    refuse(src, check_layers(shapes, Foreign("deltaw", {layers[n] or n: pair for n, pair in file.factors.items()})))
    factors = {tensors[n]: (A, reorder(tensors[n], B, False)) for n, (A, B) in file.factors.items()}
    scales = {tensors[n]: scale for n, scale in file.scales.items()}
    gguf.write(dst, GGUFLoRA(arch, factors, scales, peft.ends_of(file.metadata, src)))
    return dst


def from_gguf(src: Path, dst: Path, base: str | Path | nn.Module | None) -> Path:
    """Write a GGUF file as a PEFT folder."""
    file = gguf.read(src)
    arch, names, shapes, reorder = names_of(base)
    if arch != file.arch:
        raise FileError(f"{src} is an adapter of the architecture {file.arch!r}, the base is of {arch!r}.")
    layers = {tensor: layer for layer, tensor in names.items()}
    unknown = [name for name in file.factors if name not in layers]
    if unknown:
        raise FileError(f"The base has no layer for these tensors of {src}:", unknown)
    adapter = Foreign("gguf", {layers[n]: pair for n, pair in file.factors.items()}, ends=file.ends, task="CAUSAL_LM")
    refuse(src, check_layers(shapes, adapter))
    adapter.factors = {layers[n]: (A, reorder(n, B, True)) for n, (A, B) in file.factors.items()}
    adapter.scales = {layers[n]: scale for n, scale in file.scales.items()}
    return as_folder(adapter, dst, base)


Reorder = Callable[[str, Tensor, bool], Tensor]
"""llama.cpp's name of a tensor, its B, and whether it goes from llama.cpp's order of rows to transformers' → B in that order."""


def names_of(base: str | Path | nn.Module | None) -> tuple[str, dict[str, str], Layers, Reorder]:
    """Return llama.cpp's architecture of a base, layer name → its tensor's name there, the layers, and what orders a B's rows.

    Raises:
        ConfigError: without a base.
        FileError: for a base of another architecture than those that are known.
    """
    if not base or isinstance(base, nn.Module):
        raise ConfigError(
            "Give the base (command line: --base), a model folder or hub id: its config says how layers are named."
        )
    package = gguf.package()
    config = base_config(base)
    if config.model_type not in ARCHITECTURES:
        raise FileError(
            f"{base} is a {config.model_type!r}; GGUF adapters are converted for {', '.join(ARCHITECTURES)}, whose weights "
            "llama.cpp is known to store in this order."
        )
    arch, permuted = ARCHITECTURES[config.model_type]
    number = {name: value for value, name in package.MODEL_ARCH_NAMES.items()}[arch]
    table = package.get_tensor_name_map(number, config.num_hidden_layers)
    model = without_weights(base, causal=True)
    tensors = {
        name: table.get_name(f"{name}.weight", try_suffixes=(".weight",))
        for name, module in model.named_modules()
        # A head that is tied to the embedding has no tensor of its own there
        if kind_of(module) is not None and not (config.tie_word_embeddings and name == "lm_head")
    }
    heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}

    def reorder(name: str, B: Tensor, back: bool) -> Tensor:
        count = next((count for part, count in heads.items() if part in name), None) if permuted else None
        return B if count is None else halves(B, count, back)

    named = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return arch, named, layers_of(model, False), reorder


def halves(B: Tensor, heads: int, back: bool) -> Tensor:
    """Return B [d, r] with the rows of rotary pairs in llama.cpp's order, or `back` in transformers'.

    Rotary positions turn pairs of rows. transformers has the first of all pairs of a head before the second ones, llama.cpp has
    each pair together.
    """
    pairs = B.shape[0] // heads // 2
    shape = (heads, pairs, 2, -1) if back else (heads, 2, pairs, -1)
    return B.reshape(shape).transpose(1, 2).reshape(B.shape)
