"""Adapters of other formats ↔ PEFT's folder: loralib's checkpoints, and llama.cpp's GGUF files by the names of a base's
layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import ConfigError, FileError
from deltaw.files.formats import loralib, peft
from deltaw.files.formats.atomic import replacing
from deltaw.files.formats.gguf import GGUFLoRA, package, read, write
from deltaw.files.formats.peft import SLICES, LoRAFile
from deltaw.files.formats.peft_config import config_for
from deltaw.layers.kinds import Runs, kind_of
from deltaw.layers.names import found_as
from deltaw.methods.updates.lowrank import sliced_rows

_LORALIB = (".pt", ".bin", ".ckpt", ".pth")
_ORIGIN = "deltaw_converted_from"
# Names of heads that PEFT trains of a classifier of texts
_HEADS = ("classifier", "score")

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
    base: str | Path | nn.Module | None = None,
) -> Path:
    """Write the adapter in `src` as `dst`, atomically. Returns `dst`.

    From loralib's checkpoints (.pt, .bin or .ckpt) to a PEFT folder: they carry no α, so give `alpha`; and where their
    merged layers have updates of some of query, key and value, which `parts` ("q", "v"; or "101", a digit a part). Heads and
    biases in them become modules and biases that are trained whole. `base`, also as a model, says which layers embed tokens or
    are convolutions; without it, embeddings are told by their names. Back from a PEFT folder to a checkpoint, for `alpha`
    (default: the adapter's).

    From a GGUF file to a PEFT folder and back: `base` is the model folder or hub id whose config says how the layers are named.

    Raises FileError with everything wrong, ConfigError for settings that are missing; `dst` is then as it was."""
    src, dst = Path(src), Path(dst)
    if dst.suffix == ".gguf":
        return _to_gguf(src, dst, base)
    if src.is_dir() and dst.suffix in _LORALIB:
        return _to_loralib(src, dst, alpha)
    if not src.is_file():
        raise FileError(
            f"There is no file {src} to convert. (A PEFT folder is converted to a .gguf file, or to loralib's .bin or .pt.)"
        )
    if src.suffix == ".gguf":
        return _from_gguf(src, dst, base)
    if src.suffix not in _LORALIB:
        raise FileError(
            f"{src} is no adapter to convert by its name: loralib's end in .pt, .bin or .ckpt, llama.cpp's in .gguf."
        )
    return _from_loralib(src, dst, alpha, parts, base)


def _write(
    dst: Path,
    factors: dict[str, tuple[Tensor, Tensor]],
    scales: dict[str, float],
    origin: str,
    ends: Sequence[int] = (),
) -> Path:
    metadata = {_ORIGIN: origin} | ({peft.ENDS: json.dumps(list(ends))} if ends else {})
    return peft.write(dst, LoRAFile(factors, scales, _config(factors, scales), metadata))


def _config(factors: dict[str, tuple[Tensor, Tensor]], scales: dict[str, float], **others: Any) -> dict[str, Any]:
    ranks = {layer: A.shape[0] for layer, (A, _) in factors.items()}
    settings: dict[str, Any] = {"task": None, **others}
    return config_for(
        ranks, scales, target_modules=sorted(factors), dropout=0.0, rank_stabilised=False, transposed=False, base=None, **settings
    )  # fmt: skip


# --- loralib ----------------------------------------------------------------------------------------------------


def _from_loralib(
    src: Path, dst: Path, alpha: float | None, parts: Sequence[str], base: str | Path | nn.Module | None
) -> Path:
    layers = None if base is None else _layers(base)
    found = loralib.read(src, alpha=alpha, parts=parts, layers=layers)
    modules, bias, task = _trained_whole(found)
    metadata = {_ORIGIN: "loralib"} | ({SLICES: json.dumps(found.slices)} if found.slices else {})
    config = _config(found.factors, found.scales, task=task, bias=bias, modules_to_save=modules or None)
    file = LoRAFile(
        found.factors, found.scales, config, metadata, embeddings=frozenset(found.embeddings), kernels=found.kernels,
        whole=found.whole,
    )  # fmt: skip
    return peft.write(dst, file)


def _trained_whole(found: loralib.Checkpoint) -> tuple[list[str], str, str | None]:
    """The modules that PEFT is to copy, which biases train, and PEFT's name of the task, where the head tells it."""
    weighted = {name.rpartition(".")[0] for name in found.whole if not name.endswith(".bias")}
    biased = {name.rpartition(".")[0] for name in found.whole if name.endswith(".bias")}
    alone = biased - weighted
    bias = "none" if not alone else "lora_only" if alone <= found.factors.keys() else "all"
    roots = {module.split(".")[0] for module in weighted} & {*_HEADS}
    heads = {module for module in weighted if module.split(".")[0] in roots}
    # PEFT copies a classifier as one module, all of whose parameters must then be in the file
    whole = len(roots) == 1 and all(module in roots or module in biased for module in heads)
    modules = {*(weighted - heads), *roots} if whole else weighted
    return sorted(modules), bias, "SEQ_CLS" if whole else None


def _layers(base: str | Path | nn.Module) -> loralib.Layers:
    """The layers of a base."""
    model: Any = base if isinstance(base, nn.Module) else _without_weights(base)
    named = {n: m for n, m in model.named_modules() if isinstance(m._parameters.get("weight"), Tensor)}
    embeddings = frozenset(n for n, m in named.items() if isinstance(m, nn.Embedding))
    shapes = {n: tuple(m.weight.shape) for n, m in named.items()}
    conv1d = {n for n, m in named.items() if type(m).__name__ == "Conv1D"}
    return loralib.Layers({n: shape[::-1] if n in conv1d else shape for n, shape in shapes.items()}, embeddings)


def _without_weights(base: str | Path) -> Any:
    """The model that a config describes; no weight is read."""
    import transformers

    config = _base_config(base)
    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, name, None)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config) if kind is None else kind(config)


def _to_loralib(src: Path, dst: Path, alpha: float | None) -> Path:
    """A checkpoint that loralib's layers load, of ranks as they are, for one α. Where a layer's scale is another one than α/r,
    its B carries the difference."""
    file, problems = peft.read(src), list[str]()
    problems += [f"{layer}: DoRA's magnitude" for layer in file.magnitudes]
    problems += [f"{layer}: rows of some tokens" for layer in file.rows]
    problems += [f"{layer}: a bias that its base has none of" for layer in file.biases]
    problems += [f"{layer}: a convolution, of another form there" for layer in file.kernels]
    problems += [
        f"{layer}: a stack of matrices" for layer in file.factors if file.rank(layer) != len(file.factors[layer][0])
    ]
    if problems:
        raise FileError(f"loralib has no form for what is in {src}:", problems)
    slices, chosen = peft.slices_of(file), alpha_for_loralib(file) if alpha is None else alpha
    state: dict[str, Tensor] = dict(file.whole)
    for layer, (A, B) in file.factors.items():
        merged = _merged_rows(B, slices[layer]) if layer in slices else None
        rows = B if merged is None else merged
        factor = file.scales[layer] * rows.shape[1] / chosen
        state[f"{layer}.lora_A"] = A
        state[f"{layer}.lora_B"] = rows if abs(factor - 1.0) < 1e-9 else rows * factor
    with replacing(dst) as temporary:
        torch.save({key: t.detach().contiguous().clone() for key, t in state.items()}, temporary)
    return dst


def alpha_for_loralib(file: LoRAFile) -> float:
    """The α that most layers have there, where a merged layer's r is that of one of its parts."""
    slices = peft.slices_of(file)
    ranks = {layer: len(A) // max(1, len(slices.get(layer, {}))) for layer, (A, _) in file.factors.items()}
    alphas = [round(file.scales[layer] * r, 9) for layer, r in ranks.items()]
    return max(dict.fromkeys(alphas), key=alphas.count)


def _merged_rows(B: Tensor, slices: Mapping[str, Runs]) -> Tensor | None:
    """A MergedLinear's B [d/parts·n, r] of slices that are its parts, in order; None for others."""
    runs = [own[0] for own in slices.values() if len(own) == 1]
    height = runs[0][1] - runs[0][0] if runs else 0
    even = height and all(b - a == height and a % height == 0 for a, b in runs) and B.shape[0] % height == 0
    if len(runs) != len(slices) or not even or runs != sorted(runs):
        return None
    return sliced_rows(B, slices)


# --- GGUF -------------------------------------------------------------------------------------------------------


def _to_gguf(src: Path, dst: Path, base: str | Path | nn.Module | None) -> Path:
    file = peft.read(src)
    if others := file.beyond():
        raise FileError(f"A GGUF adapter holds A and B of dense layers alone; {src} has more, for", others)
    arch, names, reorder = _names(base or file.config.get("base_model_name_or_path"))
    layers = {layer: found_as(layer, names, {}) for layer in file.factors}
    unknown = [layer for layer, name in layers.items() if name is None]
    if unknown:
        raise FileError(f"llama.cpp has no tensor for these layers of {src}:", unknown)
    theirs = {layer: names[name] for layer, name in layers.items() if name is not None}
    factors = {theirs[n]: (A, reorder(theirs[n], B, False)) for n, (A, B) in file.factors.items()}
    scales = {theirs[n]: scale for n, scale in file.scales.items()}
    write(dst, GGUFLoRA(arch, factors, scales, peft.ends_of(file, src)))
    return dst


def _from_gguf(src: Path, dst: Path, base: str | Path | nn.Module | None) -> Path:
    file = read(src)
    arch, names, reorder = _names(base)
    if arch != file.arch:
        raise FileError(f"{src} is an adapter of the architecture {file.arch!r}, the base is of {arch!r}.")
    layers = {theirs: own for own, theirs in names.items()}
    unknown = [name for name in file.factors if name not in layers]
    if unknown:
        raise FileError(f"The base has no layer for these tensors of {src}:", unknown)
    factors = {layers[n]: (A, reorder(n, B, True)) for n, (A, B) in file.factors.items()}
    return _write(dst, factors, {layers[n]: scale for n, scale in file.scales.items()}, "gguf", file.ends)


_Reorder = Callable[[str, Tensor, bool], Tensor]


def _names(base: str | Path | nn.Module | None) -> tuple[str, dict[str, str], _Reorder]:
    """llama.cpp's architecture of a base; layer name → its tensor's name there; and what orders the rows of a tensor's B:
    (name, B, from llama.cpp's order to transformers')."""
    if not base or isinstance(base, nn.Module):
        raise ConfigError(
            "Give the base (command line: --base), a model folder or hub id: its config says how layers are named."
        )
    from transformers import AutoModelForCausalLM

    gguf = package()
    config = _base_config(base)
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


def _base_config(base: str | Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(base))
    except (OSError, ValueError) as error:
        raise FileError(f"{base} has no config that can be read: {error}") from error


def _halves(B: Tensor, heads: int, back: bool) -> Tensor:
    """Rotary positions turn pairs of rows. transformers has the first of all pairs of a head before the second ones,
    llama.cpp has each pair together."""
    pairs = B.shape[0] // heads // 2
    shape = (heads, pairs, 2, -1) if back else (heads, 2, pairs, -1)
    return B.reshape(shape).transpose(1, 2).reshape(B.shape)
