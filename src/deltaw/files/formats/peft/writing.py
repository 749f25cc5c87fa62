"""Write a LoRA adapter's folder, and read it back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor

from deltaw.errors import FileError
from deltaw.files.formats.atomic import check_replaceable, replacing_folder
from deltaw.files.formats.model_folder import TOKENIZER_FILES
from deltaw.files.formats.peft.adapter import LoRAFile
from deltaw.files.formats.peft.card import NAME as CARD
from deltaw.files.formats.peft.card import card_of, is_ours
from deltaw.files.formats.peft.config import CONFIG, PICKLED, WEIGHTS, PeftConfig
from deltaw.files.formats.peft.keys import PREFIX
from deltaw.files.formats.peft.metadata import SCALES, sealed
from deltaw.files.formats.peft.ranks import scale_of
from deltaw.files.formats.peft.reading import read
from deltaw.files.formats.peft.targets import saved_module, tokens_of
from deltaw.files.formats.safetensors import write as write_tensors
from deltaw.layers.tree import is_finite


def write(folder: Path, adapter: LoRAFile, beside: Callable[[Path], None] = lambda folder: None) -> Path:
    """Write the folder atomically, then read it back and compare.

    Args:
        folder: the adapter's; one that was there is replaced.
        adapter: what to write.
        beside: adds other files to the folder.

    Raises:
        ConfigError: for a folder with other things than an adapter in it.
        FileError: for values that are not finite, when the file reads back differently, and where it cannot be written.
    """
    tensors = _stored(adapter)

    def same(temporary: Path) -> bool:
        back = read(temporary)
        return alike(_keys(back), tensors) and back.scales == adapter.scales and _same_tokens(back, adapter)

    return write_folder(folder, adapter.config, tensors, _metadata(adapter), same, beside)


def write_folder(
    folder: Path, config: PeftConfig, tensors: dict[str, Tensor], metadata: dict[str, str],
    same: Callable[[Path], bool], beside: Callable[[Path], None],
) -> Path:  # fmt: skip
    """Write an adapter's files and its card atomically.

    `same` tells whether a folder reads back as it was meant; `beside` adds files.

    An adapter that is there is replaced, and what else is in its folder stays. Raises FileError for values that are not finite,
    and where `same` is False; ConfigError for a folder with other things in it and no adapter.
    """
    check_adapter_place(folder)
    if bad := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
        raise FileError("Not saved: values are not finite (NaN or infinity) in", bad)
    with replacing_folder(folder) as temporary:
        (temporary / CONFIG).write_text(_text(config), encoding="utf-8")
        write_tensors(temporary / WEIGHTS, tensors, sealed(tensors, metadata))
        if not same(temporary):
            raise FileError(f"Not saved: what was written to {folder} did not read back the same.")
        if is_ours(folder / CARD):
            (temporary / CARD).write_text(card_of(config, metadata).text(), encoding="utf-8")
        beside(temporary)
        _keep_others(folder, temporary)
    return folder


def check_adapter_place(folder: Path) -> None:
    """Raise ConfigError where no adapter can be written to `folder`: it holds other things, and no adapter to replace."""
    check_replaceable(folder, "an adapter", lambda there: [] if (there / CONFIG).is_file() else None)


def _keep_others(folder: Path, new: Path) -> None:
    """Take along what is in an adapter's folder and is not the adapter, such as notes or a trainer's checkpoints."""
    for path in folder.iterdir() if folder.is_dir() else ():
        kept = new / path.name
        if path.name in (CONFIG, WEIGHTS, PICKLED, *TOKENIZER_FILES) or os.path.lexists(kept):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, kept, symlinks=True, copy_function=_link)
        else:
            _link(path, kept)


def _link(old: str | Path, new: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has no such names."""
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(old, new, follow_symlinks=False)


def size(adapter: LoRAFile) -> int:
    """Return the bytes that the adapter's two files would take, without its card."""
    tensors = _stored(adapter)
    return len(save_bytes(tensors, metadata=sealed(tensors, _metadata(adapter)))) + len(_text(adapter.config).encode())


def _text(config: PeftConfig) -> str:
    return json.dumps(config.settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def alike(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in others)


def _stored(adapter: LoRAFile) -> dict[str, Tensor]:
    """Return the file's tensors on the CPU, each in memory of its own, as safetensors wants them."""
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in _keys(adapter).items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses memory that two names share, as layers do that follow one value
        tensors[key] = value.clone() if value.data_ptr() in places else value
        places.add(value.data_ptr())
    return tensors


def _metadata(adapter: LoRAFile) -> dict[str, str]:
    """Return what the safetensors header says, with the scales that no α of the settings gives to the last bit."""
    exact = {
        layer: scale
        for layer, scale in adapter.scales.items()
        if scale_of(layer, adapter.rank(layer), adapter.config) != scale
    }
    others = {key: value for key, value in adapter.metadata.items() if key != SCALES}
    return {"format": "pt", **others, **({SCALES: json.dumps(exact, sort_keys=True)} if exact else {})}


def _same_tokens(one: LoRAFile, other: LoRAFile) -> bool:
    return one.rows.keys() == other.rows.keys() and all(
        torch.equal(one.rows[layer][0], other.rows[layer][0].cpu()) for layer in one.rows
    )


def _keys(adapter: LoRAFile) -> dict[str, Tensor]:
    """Return the file's tensors by their keys: what keys.py's `sort` sorts."""
    tensors: dict[str, Tensor] = {}
    for layer, (A, B) in adapter.factors.items():
        embedding, kernel = layer in adapter.embeddings, adapter.kernels.get(layer)
        if kernel is not None:
            A, B = A.view(-1, *kernel), B.view(*B.shape, *[1] * (len(kernel) - 1))
        tensors[f"{layer}.lora_embedding_A" if embedding else f"{layer}.lora_A.weight"] = A
        tensors[f"{layer}.lora_embedding_B" if embedding else f"{layer}.lora_B.weight"] = B
    for layer, m in adapter.magnitudes.items():
        ones = [1] * (len(adapter.kernels[layer]) - 1) if layer in adapter.kernels else None
        tensors[f"{layer}.lora_magnitude_vector"] = m if ones is None else m.view(1, -1, *ones)
    tensors |= {f"{layer}.lora_B.bias": b for layer, b in adapter.biases.items()}
    for layer, (indices, rows) in adapter.rows.items():
        order = torch.searchsorted(indices.cpu(), torch.tensor(tokens_of(layer, adapter.config)))
        tensors[f"{layer}.token_adapter.trainable_tokens_delta"] = rows[order.to(rows.device)]
    inner = {layer.replace(".base_layer.", "."): layer for layer in adapter.factors if ".base_layer." in layer}
    for name, value in {**adapter.whole, **adapter.copies}.items():
        layer, parameter = name.rsplit(".", 1)
        layer = inner.get(layer, layer)
        inside = "token_adapter.base_layer." if layer in adapter.rows and name in adapter.copies else ""
        inside = "base_layer." if layer in adapter.factors else inside
        tensors[f"{layer}.{inside}{parameter}"] = value
    for name, value in adapter.originals.items():
        module = saved_module(name, adapter.config) or name.rpartition(".")[0]
        tensors[f"{module}.original_module{name.removeprefix(module)}"] = value
    return {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
