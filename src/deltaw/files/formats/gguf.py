"""LoRA adapters as llama.cpp reads them: a GGUF file by llama.cpp's own names of tensors. No model code. Needs the gguf package.

It has `<tensor>.lora_a` [r, k] and `<tensor>.lora_b` [d, r], and one α for all. llama.cpp multiplies BA by α/r with each tensor's
own r. Where an adapter's scales differ from that, the rest goes into B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.errors import FileError
from deltaw.files.formats.atomic import replacing
from deltaw.files.formats.peft.ranks import commonest
from deltaw.layers.tree import is_finite

_PARTS = {".lora_a": 0, ".lora_b": 1}
# A key of ours, which llama.cpp passes over: the tokens that end what the adapter was taught to say
_ENDS = "deltaw.model.ends"


class GGUFLoRA(NamedTuple):
    """The contents of a file."""

    arch: str
    factors: dict[str, tuple[Tensor, Tensor]]
    """llama.cpp's name of a tensor → A [r, k], B [d, r], float32."""
    scales: dict[str, float]
    ends: tuple[int, ...] = ()
    """Ids of the tokens that end what it was taught to say."""


def package() -> ModuleType:
    """Return the gguf package. Raises FileError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise FileError("GGUF files need a package that is not installed: pip install 'deltaw[gguf]'") from error
    return gguf


def write(path: Path, adapter: GGUFLoRA) -> None:
    """Write the file atomically, in float32."""
    gguf = package()
    alpha = _alpha(adapter)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, adapter.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if adapter.ends:
            writer.add_array(_ENDS, list(adapter.ends))
        factors = {}
        for name, (A, B) in adapter.factors.items():
            rest = adapter.scales[name] / (alpha / A.shape[0])
            factors[name] = A.detach().float().contiguous(), (B.detach().float() * rest).contiguous()
            for part, tensor in zip(_PARTS, factors[name], strict=True):
                writer.add_tensor(f"{name}{part}", tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if not _has(temporary, factors):
            raise FileError(
                f"{path} could not be written whole: the disk may be full. What was there before is there still."
            )


def _has(path: Path, factors: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    """Return whether a file that was just written has these A and B.

    The gguf package writes tensors by NumPy's `tofile`, which tells of no error where the last bytes find no place.
    """
    try:
        written = read(path).factors
    except FileError:
        return False
    return written.keys() == factors.keys() and all(
        torch.equal(a, b) for name, pair in factors.items() for a, b in zip(written[name], pair, strict=True)
    )


def _alpha(adapter: GGUFLoRA) -> float:
    """Return the α that most layers have: their B's stay as they are."""
    alphas = [round(adapter.scales[name] * A.shape[0], 6) for name, (A, _) in adapter.factors.items()]
    return commonest(alphas, 1.0) or 1.0  # llama.cpp takes 0 for "no scaling"


def read(path: Path) -> GGUFLoRA:
    """Read and check a file. Raises FileError with everything wrong."""
    gguf = package()
    try:
        file = gguf.GGUFReader(path)
        settings = {
            key: file.get_field(key)
            for key in ("general.type", "adapter.type", "adapter.lora.alpha", "general.architecture", _ENDS)
        }
        kind, form, alpha, arch, ends = (field.contents() if field is not None else None for field in settings.values())
    except (OSError, ValueError, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read as a GGUF file: {error}") from error
    if kind != "adapter" or form != "lora":
        raise FileError(f"{path} is no LoRA adapter: its general.type is {kind!r}, its adapter.type {form!r}.")
    if not isinstance(arch, str):
        raise FileError(f"{path} cannot be used: its general.architecture is {arch!r}.")
    alpha = 0.0 if alpha is None else alpha  # as llama.cpp takes a file without one
    pairs: dict[str, dict[int, Tensor]] = {}
    problems = []
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        problems.append(f"its adapter.lora.alpha is {alpha!r}; it must be a finite number")
    for tensor in file.tensors:
        name, part = tensor.name[:-7], tensor.name[-7:]
        if part not in _PARTS:
            problems.append(f"{tensor.name} is no A or B")
        elif tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            problems.append(f"{tensor.name} is {tensor.tensor_type.name}; F32 and F16 are read")
        else:
            pairs.setdefault(name, {})[_PARTS[part]] = torch.from_numpy(tensor.data.copy()).float()
    problems += [why for name, pair in pairs.items() if (why := _misfit(name, pair))]
    if not pairs:
        problems.append("there is no A or B in it")
    if problems:
        raise FileError(f"{path} cannot be used:", problems)
    factors = {name: (pair[0], pair[1]) for name, pair in pairs.items()}
    # Without α, and with α = 0, llama.cpp adds BA as it is
    scales = {name: (alpha / A.shape[0] if alpha else 1.0) for name, (A, _) in factors.items()}
    return GGUFLoRA(arch, factors, scales, tuple(int(end) for end in ends or ()))


def _misfit(name: str, pair: Mapping[int, Tensor]) -> str | None:
    """Say what is wrong with one tensor's A and B."""
    if len(pair) < 2:
        return f"{name} has no lora_{'b' if 0 in pair else 'a'}"
    A, B = pair[0], pair[1]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        return f"{name}: A is {list(A.shape)} and B {list(B.shape)}; they must be [r, k] and [d, r]"
    return None if is_finite(A) and is_finite(B) else f"{name} has values that are not finite"
