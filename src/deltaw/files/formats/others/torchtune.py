"""torchtune's own adapter file (adapter_0.pt, adapter.pt). No model code.

It has `layers.N.<layer>.lora_a.weight` [r, k] and `.lora_b.weight` [d, r], and `.magnitude` [d] with DoRA. α is in
adapter_config.json, where the recipe wrote one beside it. Models of Meta's and Google's have the rows of q and k in another order
than transformers: each rotary pair together. (Source: torchtune, models/convert_weights.py.) The adapter_model files that it
also writes are PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from torch import Tensor

from deltaw.files.formats.others.foreign import Foreign, pair_problem, put, rank_problems, read_any, refuse
from deltaw.files.formats.strict_json import read_object

_CONFIG = "adapter_config.json"
_KEY = re.compile(
    r"(?P<layer>(?:decoder\.)?(?:layers\.\d+\..+|output|tok_embeddings))"
    r"\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)"
)
_NAMES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
}  # fmt: skip
# model_type of transformers → whether torchtune has the rows of q and k in another order
ORDERS = {
    "llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False,
}  # fmt: skip

Reorder = Callable[[str, Tensor], Tensor]
"""transformers' name of a layer, and its B [d, r] → B in transformers' order of rows."""


def is_state(keys: Collection[str]) -> bool:
    """Return whether tensors of these names are an adapter of torchtune's."""
    return any(_KEY.fullmatch(key) and ".lora_a." in key for key in keys)


def read(path: Path, *, alpha: float | None, reorder: Reorder) -> Foreign:
    """Read and check a file.

    Args:
        path: the file.
        alpha: α, in place of that in adapter_config.json beside it.
        reorder: puts rows into transformers' order.

    Raises:
        FileError: with everything wrong: no α, an A without its B, other keys.
    """
    tensors, _ = read_any(path)
    adapter, problems = Foreign("torchtune", task="CAUSAL_LM"), list[str]()
    settings = _settings(path.parent / _CONFIG)
    alpha = alpha if alpha is not None else _alpha(settings)
    if alpha is None:
        reason = (
            f"{_CONFIG} is not beside it" if settings is None else f"the lora_alpha of {_CONFIG} is no number above 0"
        )
        problems.append(f"there is no α: {reason}. Give the alpha (command line: --alpha)")
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        layer = _name(match["layer"].removeprefix("decoder.")) if match else None
        if match is None or layer is None:
            problems.append(f"{key} ({list(tensor.shape)}) is no update of a layer of a model named as Llama's")
        else:
            put(by_layer, layer, match["part"].removesuffix(".weight"), key, tensor, problems)
    for name, parts in by_layer.items():
        missing = [part for part in ("lora_a", "lora_b") if part not in parts]
        if missing:
            problems.append(f"{name} has no {' and no '.join(missing)}")
        elif why := pair_problem(parts["lora_a"], parts["lora_b"]):
            problems.append(f"{name}: {why}")
        elif "magnitude" in parts and parts["magnitude"].shape != parts["lora_b"].shape[:1]:
            problems.append(
                f"{name}: its magnitude is {list(parts['magnitude'].shape)}, its B {list(parts['lora_b'].shape)}"
            )
        else:
            A, B = parts["lora_a"], parts["lora_b"]
            adapter.factors[name], adapter.scales[name] = (A, reorder(name, B)), (alpha or 1.0) / len(A)
            if "magnitude" in parts:
                adapter.magnitudes[name] = reorder(name, parts["magnitude"][:, None])[:, 0]
    if adapter.magnitudes and (plain := adapter.factors.keys() - adapter.magnitudes.keys()):
        problems += [f"{name} has no magnitude, which the other layers have" for name in sorted(plain)]
    if settings is not None:
        problems += _others(settings) + rank_problems(_CONFIG, settings.get("r"), adapter)
    refuse(path, problems)
    return adapter


def _name(layer: str) -> str | None:
    """Return transformers' name of a layer; None for one that it has none for."""
    if layer == "output":
        return "lm_head"
    _, number, inside = [*layer.split(".", 2), "", ""][:3]
    return f"model.layers.{number}.{_NAMES[inside]}" if inside in _NAMES else None


def _settings(path: Path) -> dict[str, object] | None:
    return read_object(path) if path.is_file() else None


def _others(settings: Mapping[str, object]) -> list[str]:
    """List the settings that a recipe of torchtune's does not write, and under which the scales are others."""
    names = [name for name in ("use_rslora", "rank_pattern", "alpha_pattern") if settings.get(name)]
    return [
        f"{_CONFIG}: {name} is {settings[name]!r}, which torchtune has not: it is another adapter's" for name in names
    ]


def _alpha(settings: Mapping[str, object] | None) -> float | None:
    alpha = None if settings is None else settings.get("lora_alpha")
    return float(alpha) if isinstance(alpha, int | float) and not isinstance(alpha, bool) and alpha > 0 else None
