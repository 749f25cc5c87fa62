"""Adapter folders as PEFT, vLLM and the HF hub read them: adapter_config.json + adapter_model.safetensors. No model code.

A file's tensors are `base_model.model.<layer>.lora_A.weight` [r, k] and `.lora_B.weight` [d, r]; the config gives α, by
pattern where it varies. What is ours goes into the safetensors metadata: format version, fingerprint, training config.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltaw.errors import BaseMismatch, FileError, listing
from deltaw.files.atomic import replacing_folder
from deltaw.files.fingerprint import Fingerprint
from deltaw.files.shards import read_tensors
from deltaw.lowrank import Product

log = logging.getLogger("deltaw")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = "1"
# Metadata: fingerprints of the whole base, and of the weights that the adapter's layers have
BASE, W0 = "deltaw_base", "deltaw_w0"
# Metadata: JSON list of the layers whose weights are stored [k, d]
TRANSPOSED = "deltaw_transposed"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.(?:weight|[^.]+\.weight))?")

# PEFT settings that change what the weights mean, and the only values under which the plain (A, B, scale) reading holds
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    # The others (PiSSA, OLoRA, CorDA, LoftQ …) begin by changing W0, so that A and B alone mean nothing
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_NUMBERS = ("r", "lora_alpha")


@dataclass(frozen=True)
class LoRAFile:
    """A low-rank adapter as it is on disk."""

    factors: dict[str, tuple[Tensor, Tensor]]
    """Layer name → A [r, k], B [d, r], on the CPU."""
    scales: dict[str, float]
    """Layer name → the factor of BA."""
    config: dict[str, Any]
    """adapter_config.json."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Ours, from the safetensors header: deltaw_format, deltaw_base, deltaw_training … Empty for foreign files."""

    def product(self, layer: str) -> Product:
        """What merging it makes of a layer's weight."""
        return Product(*self.factors[layer], self.scales[layer])


def read(folder: Path) -> LoRAFile:
    """Read and check a folder. Raises FileError with every problem: a missing or truncated file, a setting that
    this reader would misread, a key that is no A or B, an A without its B, ranks that differ, values not finite."""
    config = _read_config(folder)
    problems = [
        f"{CONFIG}: {key} is {config[key]!r}, which deltaw does not read yet"
        for key, plain in _PLAIN.items()
        if key in config and config[key] not in plain
    ]
    tensors, metadata = read_tensors(folder / WEIGHTS)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"{WEIGHTS}: unexpected key {key!r}")
            continue
        parts.setdefault(match["layer"].removeprefix(_PREFIX), {})[match["part"]] = tensor
    finite = _finite(tensors.values())
    for layer, pair in parts.items():
        problems += _pair_problems(layer, pair, finite)
    if not parts:
        problems.append(f"{WEIGHTS}: no A or B in it ({len(tensors)} tensors)")
    problems += _number_problems(config)
    if problems:
        raise FileError(listing(f"The adapter in {folder} cannot be used:", problems))
    factors = {layer: (pair["A"], pair["B"]) for layer, pair in parts.items()}
    ranks = {layer: A.shape[0] for layer, (A, _) in factors.items()}
    problems = [
        f"{layer}: rank {r} in {WEIGHTS}, {expected} in {CONFIG}"
        for layer, r in ranks.items()
        if (expected := _by_pattern(layer, config.get("rank_pattern"), config["r"])) != r
    ]
    if problems:
        raise FileError(listing(f"The adapter in {folder} cannot be used:", problems))
    return LoRAFile(factors, {layer: _scale(layer, r, config) for layer, r in ranks.items()}, config, metadata)


def write(folder: Path, adapter: LoRAFile) -> Path:
    """Write the folder atomically, then read it back and compare. Raises FileError when what was read differs."""
    tensors: dict[str, Tensor] = {}
    for layer, (A, B) in adapter.factors.items():
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = B.detach().cpu().contiguous()
    bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise FileError(listing("Not saved: values are not finite (NaN or infinity) in", bad))
    with replacing_folder(folder) as temporary:
        text = json.dumps(adapter.config, indent=2, sort_keys=True, ensure_ascii=False)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt", **adapter.metadata})
        back = read(temporary)
        same = back.factors.keys() == adapter.factors.keys() and all(
            torch.equal(x, y.detach().cpu())
            for layer, pair in adapter.factors.items()
            for x, y in zip(back.factors[layer], pair, strict=True)
        )
        if not same or back.scales != adapter.scales:
            raise FileError(f"Not saved: what was written to {folder} did not read back the same.")
    return folder


def check_base(file: LoRAFile, folder: Path, key: str, own: Callable[[], Fingerprint]) -> str:
    """Whether the adapter was made for these weights, by the fingerprint under `key` (BASE or W0) of its metadata: "same", "cast"
    (in another precision), or "unknown", of which is warned, where the file names none. Raises BaseMismatch, and FileError for
    a damaged one."""
    expected = fingerprint_of(file, folder, key)
    if expected is None:
        log.warning("%s names no base (it was not written by deltaw): only its keys and shapes are checked.", folder)
        return "unknown"
    verdict = own().compare(expected)
    if verdict == "different":
        trained_on = file.config.get("base_model_name_or_path") or "another model"
        raise BaseMismatch(
            f"The adapter in {folder} was trained on other base weights ({trained_on}) than these are.\n"
            f"Give that base, or pass check_base=False (command line: --any-base) if you know that it fits."
        )
    if verdict == "cast":
        log.debug("%s was trained on this base in another precision.", folder)
    return verdict


def transposed_layers(file: LoRAFile) -> set[str] | None:
    """The layers whose weights are stored [k, d], by our own metadata; None in foreign files."""
    if "deltaw_format" not in file.metadata:
        return None
    try:
        return set(json.loads(file.metadata.get(TRANSPOSED, "[]")))
    except (ValueError, TypeError) as error:
        raise FileError(f"The list of transposed layers in the metadata of {WEIGHTS} is damaged: {error}") from error


def fingerprint_of(file: LoRAFile, folder: Path, key: str) -> Fingerprint | None:
    """The one under `key` of its metadata. Raises FileError for a damaged one."""
    text = file.metadata.get(key)
    try:
        return None if text is None else Fingerprint.parse(text)
    except ValueError as error:
        raise FileError(f"{folder}: the base fingerprint {text!r} in its metadata is damaged.") from error


def config_for(
    ranks: Mapping[str, int], scales: Mapping[str, float], *, target_modules: list[str], dropout: float, rank_stabilised: bool,
    transposed: bool, base: str | None, task: str | None,
) -> dict[str, Any]:  # fmt: skip
    """adapter_config.json for these ranks and scales: the commonest rank and α as r and lora_alpha, others by pattern."""
    alphas = {layer: scales[layer] * (r**0.5 if rank_stabilised else r) for layer, r in ranks.items()}
    alphas = {layer: round(a) if abs(a - round(a)) < 1e-9 * max(1.0, abs(a)) else a for layer, a in alphas.items()}
    r, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {rf"^{re.escape(layer)}": x for layer, x in ranks.items() if x != r},
        "alpha_pattern": {rf"^{re.escape(layer)}": x for layer, x in alphas.items() if x != alpha},
        "target_modules": sorted(target_modules),
        "lora_dropout": dropout,
        "use_rslora": rank_stabilised,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileError(f"There is no adapter folder {folder}.")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        raise FileError(f"{folder} is not an adapter folder: {' and '.join(missing)} missing. In it: {there}.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FileError(f"{folder / CONFIG} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise FileError(f"{folder / CONFIG} holds a {type(config).__name__}, not an object of settings.")
    return config


def _number_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings that ranks and scales are computed from."""
    problems = [f"{CONFIG}: {key} is missing, so the scale α/r is unknown" for key in _NUMBERS if key not in config]
    values = {key: config[key] for key in _NUMBERS if key in config}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if isinstance(patterns, Mapping):
            values |= {f"{key}[{pattern!r}]": value for pattern, value in patterns.items()}
            problems += [
                f"{CONFIG}: {key} has {p!r}, which is no regular expression" for p in patterns if not _compiles(p)
            ]
        else:
            problems.append(f"{CONFIG}: {key} is {patterns!r}; it must map names of layers to numbers")
    problems += [
        f"{CONFIG}: {key} is {value!r}; it must be a number above 0"
        for key, value in values.items()
        if not (_is_number(value) and 0 < value < float("inf"))
    ]
    dropout = config.get("lora_dropout") or 0.0
    if not (_is_number(dropout) and 0 <= dropout < 1):
        problems.append(f"{CONFIG}: lora_dropout is {dropout!r}; it must be a probability below 1")
    if config.get("use_rslora") not in (True, False, None):
        problems.append(f"{CONFIG}: use_rslora is {config['use_rslora']!r}; it must be true or false")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries surely are: a sum is finite only if its terms are. (One that overflows tells nothing.)"""
    sums = [t.sum(dtype=torch.float32) for t in tensors if t.is_floating_point()]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def _pair_problems(layer: str, pair: Mapping[str, Tensor], finite: bool) -> list[str]:
    missing = [part for part in "AB" if part not in pair]
    if missing:
        return [f"{layer}: {missing[0]} is missing"]
    A, B = pair["A"], pair["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.numel() or not B.numel():
        return [f"{layer}: A is {tuple(A.shape)} and B {tuple(B.shape)}; they must be [r, k] and [d, r]"]
    if not A.is_floating_point() or not B.is_floating_point():
        return [f"{layer}: A is {A.dtype} and B {B.dtype}; they must be floating point"]
    if finite:
        return []
    return [
        f"{layer}: {n} has values that are not finite"
        for n, t in (("A", A), ("B", B))
        if not bool(torch.isfinite(t).all())
    ]


def _scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = _by_pattern(layer, config.get("alpha_pattern"), config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(layer: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the layer's name from a dot (or its start) on."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer) or re.fullmatch(pattern, layer):
            return value
    return default


def _commonest(values: list[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)
