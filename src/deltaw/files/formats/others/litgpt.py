"""litgpt's lit_model.pth.lora, with the settings beside it. No model code.

It has `transformer.h.N.<layer>.lora_A` [r, k] and `.lora_B` [d, r]. Query, key and value are one layer, of which some parts have
updates: its A's lie one under the other [r·parts, k], and its B's too [Σ d, r]. r and α are in hyperparameters.yaml, the numbers
of heads in model_config.yaml. Rows are in transformers' order. (Source: litgpt, lora.py and scripts/convert_lit_checkpoint.py.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from torch import Tensor

from deltaw.errors import FileError, first_line
from deltaw.files.formats.others.foreign import Foreign, pair_problem, put, rank_problems, read_any, refuse

SUFFIX = ".lora"
_WEIGHTS, _SETTINGS, _MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
_KEY = re.compile(
    r"(?:_forward_module\.)?(?:transformer\.h\.(?P<number>\d+)\.(?P<layer>attn\.(?:attn|qkv|proj)|mlp\.(?:fc_1|fc_2|fc|proj))|(?P<head>lm_head))"
    r"\.lora_(?P<part>[AB])"
)
_NAMES = {
    "attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
}  # fmt: skip
_MERGED = ".qkv"
_PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
_SWITCHES = {"q": "lora_query", "k": "lora_key", "v": "lora_value"}


class Heads(NamedTuple):
    """The rows of query, key and value."""

    query: int
    key: int
    value: int


def file_in(folder: Path) -> Path | None:
    """Return the adapter's file in a folder of litgpt's; None in others."""
    return path if (path := folder / _WEIGHTS).is_file() else None


def is_state(keys: Collection[str]) -> bool:
    """Return whether tensors of these names are an adapter of litgpt's."""
    matches = [match for key in keys if (match := _KEY.fullmatch(key))]
    return any(match["number"] for match in matches)


def read(path: Path, *, alpha: float | None = None, parts: Sequence[str] = (), heads: Heads | None = None) -> Foreign:
    """Read and check a file.

    Args:
        path: the file; its settings are read from the files beside it.
        alpha: α, in place of the settings'.
        parts: those of q, k and v that have updates, in place of the settings'.
        heads: the rows of query, key and value, where model_config.yaml does not say them.

    Raises:
        FileError: with everything wrong: no α, parts or numbers of heads, an A without its B, shapes that do not fit, other keys.
    """
    tensors, _ = read_any(path)
    settings, model = _yaml(path.parent / _SETTINGS), _yaml(path.parent / _MODEL)
    adapter, problems = Foreign("litgpt", task="CAUSAL_LM"), list[str]()
    alpha = alpha if alpha is not None else _number(settings.get("lora_alpha"))
    if alpha is None:
        problems.append(f"there is no α: {_SETTINGS} is not beside it. Give the alpha (command line: --alpha)")
    enabled = list(parts) or [part for part, switch in _SWITCHES.items() if settings.get(switch) is True]
    heads = _heads(model) or heads
    if model.get("mlp_class_name") not in (None, "LLaMAMLP", "GemmaMLP"):
        problems.append(
            f"{_MODEL}: mlp_class_name is {model['mlp_class_name']!r}; models named as Llama's are converted"
        )
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["layer"] == "mlp.fc":
            problems.append(f"{key} ({list(tensor.shape)}) is no update of a layer of a model named as Llama's")
        else:
            put(by_layer, _name(match), match["part"], key, tensor, problems)
    for name, pair in by_layer.items():
        if missing := [part for part in "AB" if part not in pair]:
            problems.append(f"{name} has no lora_{missing[0]}")
        elif name.endswith(_MERGED):
            problems += _split(name.removesuffix(_MERGED), pair, enabled, heads, alpha or 1.0, adapter)
        elif why := pair_problem(pair["A"], pair["B"]):
            problems.append(f"{name}: {why}")
        else:
            adapter.factors[name], adapter.scales[name] = (pair["A"], pair["B"]), (alpha or 1.0) / len(pair["A"])
    problems += rank_problems(_SETTINGS, settings.get("lora_r"), adapter)
    if not by_layer:
        problems.append("there is no lora_A or lora_B in it")
    refuse(path, problems)
    adapter.dropout = _number(settings.get("lora_dropout")) or 0.0
    return adapter


def _name(match: re.Match[str]) -> str:
    """Return transformers' name of a key's layer; of one for query, key and value a name that ends in _MERGED."""
    if match["number"] is None:
        return str(match["head"])
    return f"model.layers.{int(match['number'])}.{_NAMES.get(match['layer'], 'self_attn' + _MERGED)}"


def _split(
    name: str, pair: Mapping[str, Tensor], enabled: Sequence[str], heads: Heads | None, alpha: float, adapter: Foreign
) -> list[str]:
    """Put the parts of a layer for query, key and value into `adapter`; return what is wrong."""
    A, B = pair["A"], pair["B"]
    if why := pair_problem(A[: B.shape[-1]] if A.ndim == B.ndim == 2 else A, B):
        return [f"{name}{_MERGED}: {why}"]
    if heads is None:
        return [f"{name}: the numbers of heads are not known, as {_MODEL} is not beside it: give the base (--base)"]
    if not enabled or not set(enabled) <= _PARTS.keys():
        return [
            f"{name}: which of q, k and v have updates is not known: give parts (command line: --parts), q,v for example"
        ]
    rows = dict(zip("qkv", heads, strict=True))
    sizes, r = [rows[part] for part in "qkv" if part in enabled], B.shape[-1]
    if A.ndim != 2 or B.ndim != 2 or not r or A.shape[0] != r * len(sizes) or B.shape[0] != sum(sizes):
        return [
            f"{name}: A is {list(A.shape)} and B {list(B.shape)}; with updates of {', '.join(enabled)} of {sizes} rows they must "
            f"be [r·{len(sizes)}, k] and [{sum(sizes)}, r]"
        ]
    for i, (part, of_part) in enumerate(zip((p for p in "qkv" if p in enabled), B.split(sizes), strict=True)):
        layer = f"{name}.{_PARTS[part]}"
        adapter.factors[layer] = A[i * r : (i + 1) * r].contiguous(), of_part.contiguous()
        adapter.scales[layer] = alpha / r
    return []


def _heads(model: Mapping[str, object]) -> Heads | None:
    """Return the rows of query, key and value by model_config.yaml."""
    heads, width = model.get("n_head"), model.get("n_embd")
    groups = model.get("n_query_groups") or heads
    if not isinstance(heads, int) or not isinstance(groups, int) or not isinstance(width, int) or heads <= 0:
        return None
    size = model.get("head_size") or width // heads
    return Heads(heads * size, groups * size, groups * size) if isinstance(size, int) else None


def _yaml(path: Path) -> dict[str, object]:
    """Return a file of settings; none where there is no file. Raises FileError where it is no YAML of settings."""
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is no YAML: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise FileError(f"{path} holds no settings.")
    return settings


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None
