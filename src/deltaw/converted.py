"""Adapters of other formats ↔ PEFT's folder: loralib's checkpoints, and llama.cpp's GGUF files by the names of a base's
layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import ConfigError, FileError, listing
from deltaw.files import gguf_lora, loralib, peft
from deltaw.files.gguf_lora import GGUFLoRA
from deltaw.files.peft_config import config_for
from deltaw.layers import kind_of

# model_type of transformers → llama.cpp's architecture, and whether it stores the rows of q and k in another order. Those that
# are not here store some weight in a way that has not been checked against llama.cpp's own conversion
_ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    alpha: float | None = None,
    parts: Sequence[str] = (),
    base: str | Path | None = None,
) -> Path:
    """Write the adapter in `src` as `dst`, atomically. Returns `dst`.

    From loralib's checkpoints (.pt, .bin or .ckpt) to a PEFT folder: they carry no α, so give `alpha`; and where their
    merged layers have updates of some of query, key and value, which `parts` ("q", "v"). From a GGUF file to a PEFT folder
    and back: `base` is the model folder or hub id whose config says how the layers are named.

    Raises FileError with everything wrong, ConfigError for settings that are missing; `dst` is then as it was."""
    src, dst = Path(src), Path(dst)
    if dst.suffix == ".gguf":
        return _to_gguf(src, dst, base)
    if not src.is_file():
        raise FileError(f"There is no file {src} to convert. (A PEFT folder is converted to a .gguf file only.)")
    if src.suffix == ".gguf":
        return _from_gguf(src, dst, base)
    if src.suffix not in (".pt", ".bin", ".ckpt", ".pth"):
        raise FileError(
            f"{src} is no adapter to convert by its name: loralib's end in .pt, .bin or .ckpt, llama.cpp's in .gguf."
        )
    factors, scales = loralib.read(src, alpha=alpha, parts=parts)
    return _write(dst, factors, scales, "loralib")


def _write(
    dst: Path,
    factors: dict[str, tuple[Tensor, Tensor]],
    scales: dict[str, float],
    origin: str,
    ends: Sequence[int] = (),
) -> Path:
    ranks = {layer: A.shape[0] for layer, (A, _) in factors.items()}
    config = config_for(
        ranks,
        scales,
        target_modules=sorted(factors),
        dropout=0.0,
        rank_stabilised=False,
        transposed=False,
        base=None,
        task=None,
    )
    metadata = {"deltaw_converted_from": origin} | ({peft.ENDS: json.dumps(list(ends))} if ends else {})
    return peft.write(dst, peft.LoRAFile(factors, scales, config, metadata))


def _to_gguf(src: Path, dst: Path, base: str | Path | None) -> Path:
    file = peft.read(src)
    if others := file.beyond():
        raise FileError(listing(f"A GGUF adapter holds A and B of dense layers alone; {src} has more, for", others))
    arch, names, reorder = _names(base or file.config.get("base_model_name_or_path"))
    unknown = [layer for layer in file.factors if layer not in names]
    if unknown:
        raise FileError(listing(f"llama.cpp has no tensor for these layers of {src}:", unknown))
    factors = {names[n]: (A, reorder(names[n], B, False)) for n, (A, B) in file.factors.items()}
    scales = {names[n]: scale for n, scale in file.scales.items()}
    gguf_lora.write(dst, GGUFLoRA(arch, factors, scales, peft.ends_of(file, src)))
    return dst


def _from_gguf(src: Path, dst: Path, base: str | Path | None) -> Path:
    file = gguf_lora.read(src)
    arch, names, reorder = _names(base)
    if arch != file.arch:
        raise FileError(f"{src} is an adapter of the architecture {file.arch!r}, the base is of {arch!r}.")
    layers = {theirs: own for own, theirs in names.items()}
    unknown = [name for name in file.factors if name not in layers]
    if unknown:
        raise FileError(listing(f"The base has no layer for these tensors of {src}:", unknown))
    factors = {layers[n]: (A, reorder(n, B, True)) for n, (A, B) in file.factors.items()}
    return _write(dst, factors, {layers[n]: scale for n, scale in file.scales.items()}, "gguf", file.ends)


_Reorder = Callable[[str, Tensor, bool], Tensor]


def _names(base: str | Path | None) -> tuple[str, dict[str, str], _Reorder]:
    """llama.cpp's architecture of a base; layer name → its tensor's name there; and what orders the rows of a tensor's B:
    (name, B, from llama.cpp's order to transformers')."""
    if not base:
        raise ConfigError(
            "Give the base (command line: --base), a model folder or hub id: its config says how layers are named."
        )
    from transformers import AutoConfig, AutoModelForCausalLM

    gguf = gguf_lora.package()
    try:
        config = AutoConfig.from_pretrained(str(base))
    except (OSError, ValueError) as error:
        raise FileError(f"{base} has no config that can be read: {error}") from error
    if config.model_type not in _ARCHITECTURES:
        raise FileError(
            f"{base} is a {config.model_type!r}; GGUF adapters are converted for {', '.join(_ARCHITECTURES)}, whose weights "
            "llama.cpp is known to store in this order."
        )
    arch, permuted = _ARCHITECTURES[config.model_type]
    number = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    found = {
        n: table.get_name(f"{n}.weight", try_suffixes=(".weight",))
        for n, m in model.named_modules()
        if kind_of(m) is not None
    }
    heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}

    def reorder(name: str, B: Tensor, back: bool) -> Tensor:
        own = next((count for part, count in heads.items() if part in name), None) if permuted else None
        return B if own is None else _halves(B, own, back)

    return arch, {n: name for n, name in found.items() if name is not None}, reorder


def _halves(B: Tensor, heads: int, back: bool) -> Tensor:
    """Rotary positions turn pairs of rows. transformers has the first of all pairs of a head before the second ones,
    llama.cpp has each pair together."""
    pairs = B.shape[0] // heads // 2
    shape = (heads, pairs, 2, -1) if back else (heads, 2, pairs, -1)
    return B.reshape(shape).transpose(1, 2).reshape(B.shape)
