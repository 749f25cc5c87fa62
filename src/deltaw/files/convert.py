"""Adapters of other formats ↔ PEFT's folder.

These are loralib's checkpoints, and llama.cpp's GGUF files by the names of a base's layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltaw.errors import ConfigError, FileError, first_line, needs_its_code
from deltaw.files.formats import gguf, loralib, peft
from deltaw.files.formats.atomic import check_apart, replacing
from deltaw.files.formats.gguf import GGUFLoRA
from deltaw.files.formats.peft import LoRAFile, config_for
from deltaw.files.formats.peft.metadata import SLICES, slices_of
from deltaw.files.formats.peft.ranks import commonest
from deltaw.layers.kinds import Runs, kind_of
from deltaw.layers.names import found_as
from deltaw.methods.updates.lowrank import sliced_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LORALIB = (".pt", ".bin", ".ckpt", ".pth")
_ORIGIN = "deltaw_converted_from"
# Names of heads that PEFT trains of a classifier of texts
_HEADS = ("classifier", "score")

# model_type of transformers → llama.cpp's architecture, and whether it stores the rows of q and k in another order. Those that
# are not here store some weight in a way that has not been checked against llama.cpp's own conversion
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    alpha: float | None = None,
    parts: Sequence[str] = (),
    base: str | Path | nn.Module | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write an adapter in another format, atomically. The names of `src` and `dst` say which.

    A loralib checkpoint (.pt, .bin, .ckpt, .pth) or a GGUF file (.gguf) becomes a PEFT folder, and back. Heads and biases in a
    checkpoint become modules and biases that are trained whole.

    Args:
        src: the adapter.
        dst: what to write.
        alpha: α of a checkpoint. loralib's carry none, so to read one it is needed (default when writing: the adapter's).
        parts: which of query, key and value the merged layers of a checkpoint have updates of, "q" and "v" for example, or
            "101", a digit a part.
        base: for GGUF, the model folder or hub id whose config says how layers are named. For loralib, also as a model, it says
            which layers embed tokens or are convolutions; without it, embeddings are told by their names.
        trust_remote_code: run Python code that comes with the base.

    Returns:
        `dst`.

    Raises:
        FileError: with everything wrong in the files; `dst` is then as it was.
        ConfigError: for settings that are missing, and for a `dst` that is, holds or lies in `src` or the base, or that holds
            something else than an adapter.

    >>> import torch, deltaw
    >>> torch.save({"q_proj.lora_A": torch.ones(2, 8), "q_proj.lora_B": torch.ones(8, 2)}, "loralib.pt")
    >>> folder = deltaw.convert("loralib.pt", "converted", alpha=4)
    >>> round(deltaw.spectrum(folder)["q_proj"].norm, 6)  # ‖ΔW‖, all of whose 64 entries are α/r·2 = 4
    32.0
    """
    src, dst = Path(src), Path(dst)
    check_apart(dst, {"the adapter": src, "the base": base})
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
    layers = None if base is None else _layers(base, trust_remote_code)
    return _from_loralib(loralib.read(src, alpha=alpha, parts=parts, layers=layers), dst)


def _check_is_adapter(dst: Path, read: Callable[[], object]) -> None:
    """Raise ConfigError where a file would be replaced that is no adapter: a model's weights have the same endings."""
    if not dst.is_file():
        return
    try:
        read()
    except FileError as error:
        raise ConfigError(
            f"{dst} is not replaced, since it holds no adapter. Choose another place. ({error})"
        ) from error


# --- loralib ----------------------------------------------------------------------------------------------------


def _from_loralib(checkpoint: loralib.Checkpoint, dst: Path) -> Path:
    """Write loralib's checkpoint as a PEFT folder."""
    modules, bias, task = _trained_whole(checkpoint)
    factors, scales = checkpoint.factors, checkpoint.scales
    ranks = {layer: A.shape[0] for layer, (A, _) in factors.items()}
    file = LoRAFile(
        factors,
        scales,
        config_for(
            ranks, scales, target_modules=sorted(factors), task=task, bias=bias, modules_to_save=modules or None
        ),
        {_ORIGIN: "loralib"} | ({SLICES: json.dumps(checkpoint.slices)} if checkpoint.slices else {}),
        embeddings=frozenset(checkpoint.embeddings),
        kernels=checkpoint.kernels,
        whole=checkpoint.whole,
    )
    return peft.write(dst, file)


def _trained_whole(checkpoint: loralib.Checkpoint) -> tuple[list[str], str, str | None]:
    """Return the modules that PEFT is to copy, which biases train, and PEFT's name of the task, where the head tells it."""
    weighted = {name.rpartition(".")[0] for name in checkpoint.whole if not name.endswith(".bias")}
    biased = {name.rpartition(".")[0] for name in checkpoint.whole if name.endswith(".bias")}
    alone = biased - weighted
    bias = "none" if not alone else "lora_only" if alone <= checkpoint.factors.keys() else "all"
    roots = {module.split(".")[0] for module in weighted} & {*_HEADS}
    heads = {module for module in weighted if module.split(".")[0] in roots}
    # PEFT copies a classifier as one module, all of whose parameters must then be in the file
    whole = len(roots) == 1 and all(module in roots or module in biased for module in heads)
    modules = {*(weighted - heads), *roots} if whole else weighted
    return sorted(modules), bias, "SEQ_CLS" if whole else None


def _layers(base: str | Path | nn.Module, trust_remote_code: bool) -> loralib.Layers:
    """Return what is known of a base's layers."""
    model = base if isinstance(base, nn.Module) else _without_weights(base, trust_remote_code=trust_remote_code)
    weights = {n: (m, w) for n, m in model.named_modules() if (w := m._parameters.get("weight")) is not None}
    embeddings = frozenset(n for n, (m, _) in weights.items() if isinstance(m, nn.Embedding))
    shapes = {
        n: tuple(w.shape)[::-1] if type(m).__name__ == "Conv1D" else tuple(w.shape) for n, (m, w) in weights.items()
    }
    return loralib.Layers(shapes, embeddings)


def _without_weights(base: str | Path, *, causal: bool = False, trust_remote_code: bool = False) -> nn.Module:
    """Return the model that a config describes, as a causal one or by its own class; no weight is read. Raises FileError."""
    import transformers

    config = base_config(base, trust_remote_code)
    named = getattr(transformers, str((getattr(config, "architectures", None) or [""])[0]), None)
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    with torch.device("meta"):
        # The config may name anything in transformers; only a class of models is called
        if not causal and isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            model: nn.Module = named(config)
            return model
        try:
            model = auto.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise needs_its_code(base, error) or FileError(f"{base} cannot be built: {first_line(error)}") from error
        return model


def _to_loralib(src: Path, dst: Path, alpha: float | None) -> Path:
    """Write a checkpoint that loralib's layers load, of ranks as they are, for one α.

    Where a layer's scale is another one than α/r, its B carries the difference.
    """
    _check_is_adapter(dst, lambda: loralib.check_holds_adapter(dst))
    file, problems = peft.read(src), list[str]()
    problems += [f"{layer}: DoRA's magnitude" for layer in file.magnitudes]
    problems += [f"{layer}: rows of some tokens" for layer in file.rows]
    problems += [f"{layer}: a bias that its base has none of" for layer in file.biases]
    problems += [f"{layer}: a convolution, of another form there" for layer in file.kernels]
    problems += [f"{layer}: a stack of matrices" for layer in file.factors if file.is_stack(layer)]
    if problems:
        raise FileError(f"loralib has no form for what is in {src}:", problems)
    slices, chosen = slices_of(file.metadata), alpha_for_loralib(file) if alpha is None else alpha
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
    """Return the α that most layers have in a checkpoint, where a merged layer's r is that of one of its parts."""
    slices = slices_of(file.metadata)
    ranks = {layer: len(A) // max(1, len(slices.get(layer, {}))) for layer, (A, _) in file.factors.items()}
    alphas = [round(file.scales[layer] * r, 9) for layer, r in ranks.items()]
    return commonest(alphas, 1.0)


def _merged_rows(B: Tensor, slices: Mapping[str, Runs]) -> Tensor | None:
    """Return a MergedLinear's B [d/parts·n, r] of slices that are its parts, in order; None for others."""
    runs = [of_slice[0] for of_slice in slices.values() if len(of_slice) == 1]
    height = runs[0][1] - runs[0][0] if runs else 0
    even = height and all(b - a == height and a % height == 0 for a, b in runs) and B.shape[0] % height == 0
    if len(runs) != len(slices) or not even or runs != sorted(runs):
        return None
    return sliced_rows(B, slices)


# --- GGUF -------------------------------------------------------------------------------------------------------


def _to_gguf(src: Path, dst: Path, base: str | Path | nn.Module | None) -> Path:
    """Write a PEFT folder as a GGUF file."""
    _check_is_adapter(dst, lambda: gguf.read(dst))
    file = peft.read(src)
    if others := file.beyond():
        raise FileError(f"A GGUF adapter holds A and B of dense layers alone; {src} has more, for", others)
    arch, names, reorder = _names(base or file.config.base_model_name_or_path)
    layers = {layer: found_as(layer, names, {}) for layer in file.factors}
    unknown = [layer for layer, name in layers.items() if name is None]
    if unknown:
        raise FileError(f"llama.cpp has no tensor for these layers of {src}:", unknown)
    tensors = {layer: names[name] for layer, name in layers.items() if name is not None}
    factors = {tensors[n]: (A, reorder(tensors[n], B, False)) for n, (A, B) in file.factors.items()}
    scales = {tensors[n]: scale for n, scale in file.scales.items()}
    gguf.write(dst, GGUFLoRA(arch, factors, scales, peft.ends_of(file.metadata, src)))
    return dst


def _from_gguf(src: Path, dst: Path, base: str | Path | nn.Module | None) -> Path:
    """Write a GGUF file as a PEFT folder."""
    file = gguf.read(src)
    arch, names, reorder = _names(base)
    if arch != file.arch:
        raise FileError(f"{src} is an adapter of the architecture {file.arch!r}, the base is of {arch!r}.")
    layers = {tensor: layer for layer, tensor in names.items()}
    unknown = [name for name in file.factors if name not in layers]
    if unknown:
        raise FileError(f"The base has no layer for these tensors of {src}:", unknown)
    factors = {layers[n]: (A, reorder(n, B, True)) for n, (A, B) in file.factors.items()}
    scales = {layers[n]: scale for n, scale in file.scales.items()}
    ranks = {layer: A.shape[0] for layer, (A, _) in factors.items()}
    metadata = {_ORIGIN: "gguf"} | ({peft.ENDS: json.dumps(list(file.ends))} if file.ends else {})
    return peft.write(
        dst, LoRAFile(factors, scales, config_for(ranks, scales, target_modules=sorted(factors)), metadata)
    )


_Reorder = Callable[[str, Tensor, bool], Tensor]
"""llama.cpp's name of a tensor, its B, and whether it goes from llama.cpp's order of rows to transformers' → B in that order."""


def _names(base: str | Path | nn.Module | None) -> tuple[str, dict[str, str], _Reorder]:
    """Return llama.cpp's architecture of a base, layer name → its tensor's name there, and what orders the rows of a B.

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
    tensors = {
        name: table.get_name(f"{name}.weight", try_suffixes=(".weight",))
        for name, module in _without_weights(base, causal=True).named_modules()
        if kind_of(module) is not None
    }
    heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}

    def reorder(name: str, B: Tensor, back: bool) -> Tensor:
        count = next((count for part, count in heads.items() if part in name), None) if permuted else None
        return B if count is None else halves(B, count, back)

    return arch, {name: tensor for name, tensor in tensors.items() if tensor is not None}, reorder


def base_config(base: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the config of a model folder or hub id. Raises FileError."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(base), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        message = f"{base} has no config that can be read: {first_line(error)}"
        raise needs_its_code(base, error) or FileError(message) from error
    return config


def halves(B: Tensor, heads: int, back: bool) -> Tensor:
    """Return B [d, r] with the rows of rotary pairs in llama.cpp's order, or `back` in transformers'.

    Rotary positions turn pairs of rows. transformers has the first of all pairs of a head before the second ones, llama.cpp has
    each pair together.
    """
    pairs = B.shape[0] // heads // 2
    shape = (heads, pairs, 2, -1) if back else (heads, 2, pairs, -1)
    return B.reshape(shape).transpose(1, 2).reshape(B.shape)
