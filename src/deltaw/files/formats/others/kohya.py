"""kohya's and LyCORIS's files of one adapter for several models. No model code.

Keys are `<model>_<layer>.<part>`, with the dots of the layer's name as underscores: `lora_unet_`, `lora_te_`, `lora_te1_`,
`lycoris_`. So a base is needed to read them. Parts are those of one of these methods, each ΔW times α/r:

- LoRA and LoCon: `lora_down.weight` [r, k], `lora_up.weight` [d, r], of convolutions [r, c, …] and [d, r, 1, …]; with
  `lora_mid.weight` [r, r, …] (Tucker's form) down is [r, c, 1, …];
- LoHa: (w1_a·w1_b) ⊙ (w2_a·w2_b), which is of rank r² at most, and exactly B·A with the products of columns and of rows;
- LoKr: w1 ⊗ w2, each whole or a product of two; (w1 ⊗ w2_a)·(1 ⊗ w2_b) is exactly B·A.

What has no such form is refused by its method's name. (Source: kohya-ss/sd-scripts, networks/lora.py; LyCORIS, modules/.)
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import FileError, nearest, shown
from deltaw.files.formats.loralib import Layers
from deltaw.files.formats.others.foreign import Foreign, Pair, pair_problem, read_any, refuse

log = logging.getLogger("deltaw")

MODELS = ("lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_transformer", "lycoris")
_KEY = re.compile(rf"(?P<model>{'|'.join(MODELS)})_(?P<layer>[^.]+)\.(?P<part>.+)")
# Part of a key → the method that has it, of those that are no product of two matrices
_OTHERS = {
    "dora_scale": "weight-decomposed (DoRA by LyCORIS, whose axis and norm differ from version to version)",
    "diff": "a whole difference (full, no low-rank update)", "diff_b": "a trained bias", "w_norm": "a trained norm",
    "b_norm": "a trained norm", "oft_blocks": "OFT or BOFT, which multiplies the weight",
    "oft_diag": "Diag-OFT, which multiplies the weight",
    "on_input": "(IA)³, which multiplies the weight", "weight": "(IA)³, which multiplies the weight", "a1.weight": "GLoRA",
    "a2.weight": "GLoRA", "b1.weight": "GLoRA", "b2.weight": "GLoRA", "hada_t1": "LoHa in Tucker's form",
    "hada_t2": "LoHa in Tucker's form",
    "lokr_t1": "LoKr in Tucker's form", "lokr_t2": "LoKr in Tucker's form",
    "lora_up.bias": "a trained bias", "lora_down.bias": "a trained bias",
}  # fmt: skip
_LORA = {"lora_down.weight", "lora_up.weight"}
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}


@dataclass(frozen=True)
class _Update:
    """One layer's update, as its parts come to it."""

    pair: Pair
    rank: int
    """r in α/r, which is not that of A in other methods than LoRA; 0 where α does not count."""
    method: str


def is_state(keys: Collection[str]) -> bool:
    """Return whether tensors of these names are kohya's or LyCORIS's."""
    return any(_KEY.fullmatch(key) for key in keys)


def models_in(keys: Collection[str]) -> dict[str, int]:
    """Return the models that a file has updates of → how many layers."""
    layers: dict[str, set[str]] = {}
    for key in keys:
        if match := _KEY.fullmatch(key):
            layers.setdefault(match["model"], set()).add(match["layer"])
    return {model: len(names) for model, names in layers.items()}


def read(path: Path, layers: Layers, *, model: str | None = None) -> Foreign:
    """Read and check the updates of one model.

    Args:
        path: a safetensors file, or a pickle.
        layers: the base's.
        model: which of the file's models the base is, as its keys begin; needed where there are several.

    Raises:
        FileError: with everything wrong: layers that the base lacks, parts of a method with no form, shapes that do not fit.
    """
    tensors, metadata = read_any(path)
    models = models_in(tensors)
    model = _chosen(path, models, model)
    problems = [
        f"{key} ({list(t.shape)}) is no part of an update" for key, t in tensors.items() if not _KEY.fullmatch(key)
    ]
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is not None and match["model"] == model:
            by_layer.setdefault(match["layer"], {})[match["part"]] = tensor
    names, adapter, methods = _names(layers), Foreign("kohya"), dict[str, list[str]]()
    for flat, parts in by_layer.items():
        name = _name(flat, names, problems)
        shape = layers.shapes.get(name or "")
        update = _read_parts(flat, parts, shape, problems)
        if update is None or name is None or shape is None:
            continue
        A, B = update.pair
        if (B.shape[0], A.shape[1]) != (shape[0], torch.Size(shape[1:]).numel()) or name in layers.embeddings:
            problems.append(f"{flat}: ΔW is {[B.shape[0], A.shape[1]]}, {name} is {list(shape)}")
            continue
        scale = _scale(parts.get("alpha"), update.rank)
        if scale is None:
            problems.append(f"{flat}: its alpha is {parts['alpha'].tolist()}, no finite number")
            continue
        if why := pair_problem(A, B):
            problems.append(f"{flat}: {why}")
            continue
        if name in adapter.factors:
            problems.append(f"{flat}: other keys in the file are of {name} too")
            continue
        methods.setdefault(update.method, []).append(name)
        adapter.factors[name], adapter.scales[name] = update.pair, scale
        if len(shape) > 2:
            adapter.kernels[name] = tuple(shape[1:])
    refuse(path, problems)
    if _rank_stabilised(metadata):
        log.warning(
            "%s was trained with rs_lora. LyCORIS 4.1 puts that into the file's α, which is used; files of earlier versions may "
            "lack it, and are then weaker here, as in other readers.",
            path,
        )
    _say(path, models, model, methods, adapter)
    return adapter


def _scale(alpha: Tensor | None, rank: int) -> float | None:
    """Return α/r; 1 where there is no α, or 0, which these programs take for r. None where α is no finite number."""
    if alpha is None:
        return 1.0
    if alpha.numel() != 1 or not math.isfinite(float(alpha)):
        return None
    return (float(alpha) or rank) / rank if rank else 1.0


def _chosen(path: Path, models: Mapping[str, int], model: str | None) -> str:
    """Return the model whose updates are read. Raises FileError where that is not clear."""
    listed = ", ".join(f"{name} ({count} layers)" for name, count in models.items())
    if model is not None and model not in models:
        raise FileError(f"{path} has no updates of {model!r}; it has those of {listed}.")
    if model is None and len(models) > 1:
        raise FileError(
            f"{path} has updates of several models: {listed}. An adapter here is of one: say with parts (command line: --parts) "
            f"which of them the base is, for example {next(iter(models))}. Convert once for each."
        )
    return model or next(iter(models))


def _say(path: Path, models: Mapping[str, int], model: str, methods: Mapping[str, list[str]], adapter: Foreign) -> None:
    """Log what is left out, and which layers became low-rank updates of another rank."""
    if left := [f"{name} ({count} layers)" for name, count in models.items() if name != model]:
        log.warning("Left out, as updates of other models than the base: %s of %s.", ", ".join(left), path)
    for method, names in methods.items():
        if method != "LoRA":
            ranks = shown([str(r) for r in sorted({len(adapter.factors[name][0]) for name in names})], 8)
            log.warning("%s of %d layers is written as LoRA of rank %s, with the same ΔW.", method, len(names), ranks)


def _names(layers: Layers) -> dict[str, list[str]]:
    """Return a layer's name as keys have it → the base's names that are written so.

    A model inside another one, as transformers' text encoders have been, is also known by the name without it.
    """
    names: dict[str, list[str]] = {}
    for name in layers.shapes:
        names.setdefault(name.replace(".", "_"), []).append(name)
    return names


def _name(flat: str, names: Mapping[str, list[str]], problems: list[str]) -> str | None:
    """Return the base's name of a layer; None, with a problem, where it has none or several."""
    inner = flat.removeprefix("text_model_").removeprefix("model_")
    for candidate in (flat, f"model_{flat}", f"text_model_{flat}", inner):
        known = names.get(candidate, [])
        if len(known) == 1:
            return known[0]
        if known:
            problems.append(f"{flat} may be any of {', '.join(known)}")
            return None
    problems.append(f"{flat} is none of the base's layers{nearest(flat, names, count=1)}")
    return None


def _rank_stabilised(metadata: Mapping[str, str]) -> bool:
    """Return whether the header says that the training used α/√r."""
    try:
        settings = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return False
    return isinstance(settings, dict) and str(settings.get("rs_lora", "")).lower() in ("true", "1")


def _read_parts(
    flat: str, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None, problems: list[str]
) -> _Update | None:
    """Return what a layer's parts come to; None, with a problem, where that is no low-rank update."""
    if methods := sorted({_OTHERS[part] for part in parts if part in _OTHERS}):
        problems.append(f"{flat} is {' and '.join(methods)}: that has no form here")
        return None
    values, keys = {name: t.float() for name, t in parts.items()}, parts.keys() - {"alpha"}
    try:
        if keys == _LORA or keys == _LORA | {"lora_mid.weight"}:
            return _lora({name: parts[name] for name in keys})
        if keys == _LOHA:
            return _loha(values)
        if keys and keys <= _LOKR:
            return _lokr(values)
    except (RuntimeError, IndexError, ValueError, KeyError):
        pass
    of_base = "" if shape is None else f", in the base {list(shape)}"
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(parts.items()))
    problems.append(f"{flat}{of_base}: these are no whole update of a method that is read: {shapes}")
    return None


def _lora(parts: Mapping[str, Tensor]) -> _Update:
    """Return the update of `lora_down`, `lora_up` and, in Tucker's form, `lora_mid`."""
    down, up, mid = parts["lora_down.weight"], parts["lora_up.weight"], parts.get("lora_mid.weight")
    r = len(down)
    B = up.reshape(up.shape[0], -1)
    if B.shape[1] != r:
        raise ValueError
    if mid is None:
        return _Update((down.reshape(r, -1).contiguous(), B.contiguous()), r, "LoRA")
    A = torch.einsum("ij...,jc->ic...", mid.float(), down.float().reshape(r, -1))
    return _Update((A.reshape(len(mid), -1).contiguous(), B.float().contiguous()), r, "LoCon in Tucker's form")


def _loha(parts: Mapping[str, Tensor]) -> _Update:
    """Return (w1_a·w1_b) ⊙ (w2_a·w2_b) as B·A: the products of each two columns, and of each two rows."""
    B1, A1, B2, A2 = parts["hada_w1_a"], parts["hada_w1_b"], parts["hada_w2_a"], parts["hada_w2_b"]
    r = len(A1)
    B = torch.einsum("di,dj->dij", B1, B2).reshape(len(B1), -1)
    A = torch.einsum("ik,jk->ijk", A1, A2).reshape(-1, A1.shape[1])
    return _Update(_no_higher((A, B)), r, "LoHa")


def _lokr(parts: Mapping[str, Tensor]) -> _Update:
    """Return w1 ⊗ w2 as B·A. α does not count where both are there whole.

    A convolution's w2 [c, d, …] is flat here, [c, d·n], as the kernel's entries run fastest in ΔW too.
    """
    w1, first = _whole(parts, "lokr_w1")
    b = w1.shape[1]
    if "lokr_w2" in parts:
        w2, second = parts["lokr_w2"].flatten(1), 0
        pair = torch.kron(torch.eye(b), w2), torch.kron(w1, torch.eye(len(w2)))
    else:
        one, two = parts["lokr_w2_a"], parts["lokr_w2_b"]
        second = one.shape[1]
        pair = torch.kron(torch.eye(b), two), torch.kron(w1, one)
    return _Update(_no_higher(pair), first or second, "LoKr")


def _whole(parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, int]:
    """Return a factor of a Kronecker product, and the rank of the product that it is; 0 where it is there whole."""
    if name in parts:
        return parts[name], 0
    one, two = parts[f"{name}_a"], parts[f"{name}_b"]
    return one @ two, one.shape[1]


def _no_higher(pair: Pair) -> Pair:
    """Return A and B of the same product, of no higher rank than a matrix of its shape can have."""
    A, B = pair
    d, k = B.shape[0], A.shape[1]
    if len(A) <= min(d, k):
        return A.contiguous(), B.contiguous()
    whole = B @ A
    return (torch.eye(k), whole) if k <= d else (whole, torch.eye(d))
