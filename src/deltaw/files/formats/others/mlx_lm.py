"""mlx-lm's adapter folder: adapters.safetensors and adapter_config.json. No model code.

It has `<layer>.lora_a` [k, r] and `.lora_b` [r, d], and one `scale` for all, which multiplies the product as it is: there is no
α/r in it. `.m` [d] is DoRA's magnitude. mlx-lm makes its layers of `keys` in the last `num_layers` blocks (0 and below: in all).
It wants one rank for all of them, so smaller ones are filled up with zeros, which are left out again when they are read. Older
versions pass over tensors with no place in the model without a word. (Source: mlx-lm, tuner/utils.py, lora.py and dora.py.)
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import FileError
from deltaw.files.formats.atomic import check_replaceable, replacing_folder
from deltaw.files.formats.others.foreign import Foreign, pair_problem, refuse, scaled
from deltaw.files.formats.peft.metadata import ENDS, ends_of
from deltaw.files.formats.peft.ranks import commonest
from deltaw.files.formats.safetensors import read_tensors
from deltaw.files.formats.safetensors import write as write_tensors
from deltaw.files.formats.strict_json import read_object

log = logging.getLogger("deltaw")

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lora_a|lora_b|m)")
# A module's name within a block of layers
_IN_BLOCK = re.compile(r"(?P<blocks>.*?\blayers)\.\d+\.(?P<inside>.+)")


def is_folder(folder: Path) -> bool:
    """Return whether a folder holds an adapter of mlx-lm."""
    return (folder / WEIGHTS).is_file()


def read(folder: Path) -> Foreign:
    """Read and check a folder. Raises FileError with everything wrong."""
    if not (folder / CONFIG).is_file():
        raise FileError(f"{folder} has no {CONFIG}, which says the scale of mlx-lm's {WEIGHTS}.")
    settings = read_object(folder / CONFIG)
    tensors, metadata = read_tensors(folder / WEIGHTS)
    lora = settings.get("lora_parameters")
    lora = lora if isinstance(lora, dict) else {}
    kind, problems = settings.get("fine_tune_type", "lora"), list[str]()
    if kind not in ("lora", "dora"):
        raise FileError(
            f"{folder} holds mlx-lm's {kind!r} fine-tuning, whose file has whole weights and no adapter. Fuse it with mlx-lm, "
            "and `deltaw extract` makes an adapter of the fused model."
        )
    scale, dropout = lora.get("scale"), lora.get("dropout", 0.0)
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < abs(scale) < float("inf"):
        problems.append(f"{CONFIG}: lora_parameters.scale is {scale!r}; it must be a number other than 0")
        scale = 1.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"{CONFIG}: lora_parameters.dropout is {dropout!r}; it must be from 0 to below 1")
        dropout = 0.0
    model = settings.get("model")
    adapter = Foreign(
        "mlx-lm", dropout=float(dropout), base=model if isinstance(model, str) else None, task="CAUSAL_LM",
        ends=ends_of(metadata, folder),
    )  # fmt: skip
    _sort(tensors, float(scale), kind == "dora", adapter, problems)
    refuse(folder, problems)
    if outside := _outside(settings.get("num_layers"), adapter):
        log.warning(
            "mlx-lm itself passes over %d layers of %s, which are before the last num_layers = %s blocks; here they count.",
            len(outside), folder, settings.get("num_layers"),
        )  # fmt: skip
    return adapter


def _sort(tensors: dict[str, Tensor], scale: float, dora: bool, adapter: Foreign, problems: list[str]) -> None:
    """Put the file's tensors into `adapter`, and what is wrong with them into `problems`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            parts.setdefault(match["layer"], {})[match["part"]] = tensor
        else:
            problems.append(f"{key} is no part of a low-rank update")
    for layer, of_layer in parts.items():
        missing = [part for part in ("lora_a", "lora_b", *(["m"] if dora else [])) if part not in of_layer]
        if missing:
            problems.append(f"{layer} has no {' and no '.join(missing)}")
            continue
        if of_layer["lora_a"].ndim == 3:
            problems.append(f"{layer} is a stack of experts' matrices, of another form here")
            continue
        A, B = _without_zeros(of_layer["lora_a"].T, of_layer["lora_b"].T)
        embeds = layer.rpartition(".")[2] in ("embed_tokens", "wte")
        if why := pair_problem(A, B):
            problems.append(f"{layer}: {why} after they are transposed")
        elif not dora and "m" in of_layer:
            problems.append(f"{layer} has DoRA's m, and fine_tune_type is 'lora'")
        elif dora and (embeds or of_layer["m"].shape != B.shape[:1]):
            problems.append(f"{layer}: DoRA's m is {list(of_layer['m'].shape)}; of a dense layer it is {[B.shape[0]]}")
        else:
            adapter.factors[layer], adapter.scales[layer] = (A.contiguous(), B.contiguous()), scale
            if embeds:
                adapter.embeddings.add(layer)
            if dora:
                adapter.magnitudes[layer] = of_layer["m"]


def _without_zeros(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [r, k] and B [d, r] without the last rows and columns that are zero in both, as fill up a rank."""
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        return A, B
    used = (A.ne(0).any(1) | B.ne(0).any(0)).nonzero()
    r = int(used.max()) + 1 if used.numel() else 1
    return A[:r], B[:, :r]


def _filled_up(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A and B of rank r with the same product."""
    more = r - A.shape[0]
    return torch.cat([A, A.new_zeros(more, A.shape[1])]), torch.cat([B, B.new_zeros(B.shape[0], more)], 1)


def _outside(count: object, adapter: Foreign) -> list[str]:
    """Return the layers of blocks before the last `count` ones, as far as the adapter's own names tell."""
    if not isinstance(count, int) or count <= 0:
        return []
    numbers = {n: int(match[1]) for n in adapter.factors if (match := re.search(r"\blayers\.(\d+)\.", n))}
    first = max(numbers.values(), default=0) + 1 - count
    return [layer for layer, number in numbers.items() if number < first]


def write(folder: Path, adapter: Foreign) -> Path:
    """Write the folder atomically.

    Where layers have other scales than most, their lora_b carries the difference. Raises ConfigError for a folder with other
    things in it.
    """
    check_replaceable(folder, "an adapter of mlx-lm", lambda there: sorted({p.name for p in there.iterdir()} - {CONFIG, WEIGHTS}) if is_folder(there) else None)  # noqa: E501  # fmt: skip
    scale, tensors = commonest(list(adapter.scales.values()), 1.0), dict[str, Tensor]()
    rank = max((A.shape[0] for A, _ in adapter.factors.values()), default=1)
    for layer, pair in adapter.factors.items():
        A, B = _filled_up(*pair, rank)
        tensors[f"{layer}.lora_a"] = A.T.contiguous()
        tensors[f"{layer}.lora_b"] = scaled(B, adapter.scales[layer] / scale).T.contiguous()
    tensors |= {f"{layer}.m": m for layer, m in adapter.magnitudes.items()}
    keys = {match["inside"] if (match := _IN_BLOCK.fullmatch(n)) else n for n in adapter.factors}
    settings = {
        "fine_tune_type": "dora" if adapter.magnitudes else "lora",
        "model": adapter.base,
        "num_layers": -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": adapter.dropout,
            "keys": sorted(keys),
        },
    }
    metadata = {"format": "mlx"} | ({ENDS: json.dumps(list(adapter.ends))} if adapter.ends else {})
    with replacing_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_tensors(temporary / WEIGHTS, tensors, metadata)
        if read(temporary).factors.keys() != adapter.factors.keys():
            raise FileError(f"Not written: what went to {folder} did not read back the same.")
    return folder
