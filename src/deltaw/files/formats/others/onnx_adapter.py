"""ONNX Runtime's .onnx_adapter: a flat table of tensors, by the names of a model's inputs. No model code. Needs onnxruntime.

The tensors take the place of the inputs of an ONNX model that was exported with its adapter's weights outside. Names and forms
are Olive's: `<layer>.lora_A.weight` [k, r], `<layer>.lora_B.weight` [r, d], with the scale worked into B. onnxruntime-genai's
builder has `.MatMul` in them and `attn` for `self_attn`; these are read too. (Source: Olive, cli/convert_adapters.py;
onnxruntime, AdapterFormat.)
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from deltaw.errors import FileError, first_line
from deltaw.files.formats.atomic import replacing
from deltaw.files.formats.others.foreign import Foreign, pairs_of, put, refuse, scaled
from deltaw.layers.names import without_peft_prefix
from deltaw.layers.tree import is_finite

SUFFIX = ".onnx_adapter"
_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?P<built>\.MatMul)?\.weight")


def package() -> ModuleType:
    """Return onnxruntime. Raises FileError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise FileError(
            ".onnx_adapter files need a package that is not installed: pip install 'deltaw[onnx]'"
        ) from error
    return onnxruntime  # type: ignore[no-any-return]


def read(path: Path) -> Foreign:
    """Read and check a file. Scales are 1: the file has them in B. Raises FileError with everything wrong."""
    onnxruntime = package()
    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        values = {name: value.numpy().copy() for name, value in file.get_parameters().items()}
    except Exception as error:  # onnxruntime raises bare RuntimeErrors and errors of its own
        raise FileError(f"{path} cannot be read by onnxruntime: {first_line(error)}") from error
    problems: list[str] = []
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        match = _KEY.fullmatch(without_peft_prefix(name))
        if match is None or value.dtype.kind != "f":
            quantised = " (a quantised adapter; export it in float32 or float16)" if ".quant." in name else ""
            problems.append(f"{name} is {value.dtype} {list(value.shape)}, no A or B of a layer{quantised}")
            continue
        layer = match["layer"].replace(".attn.", ".self_attn.") if match["built"] else match["layer"]
        put(parts, layer, match["part"], name, torch.from_numpy(value).T.contiguous(), problems)
    factors = pairs_of(parts, problems)
    refuse(path, problems or ([] if factors else ["there is no lora_A or lora_B in it"]))
    return Foreign("onnx_adapter", factors, dict.fromkeys(factors, 1.0))


def write(path: Path, adapter: Foreign) -> Path:
    """Write the file atomically: float16 where all is float16, else float32. Raises FileError for values that are too large."""
    onnxruntime = package()
    half = all(t.dtype == torch.float16 for pair in adapter.factors.values() for t in pair)
    dtype = torch.float16 if half else torch.float32
    tensors: dict[str, Tensor] = {}
    for layer, (A, B) in adapter.factors.items():
        tensors[f"{layer}.lora_A.weight"] = A.to(dtype).T.contiguous()
        tensors[f"{layer}.lora_B.weight"] = scaled(B, adapter.scales[layer]).to(dtype).T.contiguous()
    if bad := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise FileError(f"Not written: with the scale in B, values do not fit into {dtype} in", bad)
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(t.numpy()) for n, t in tensors.items()})
    with replacing(path) as temporary:
        file.export_adapter(str(temporary))
        back = read(temporary)
        same = all(
            torch.equal(back.factors[layer][part], tensors[f"{layer}.lora_{'AB'[part]}.weight"].T)
            for layer in adapter.factors
            for part in (0, 1)
        )
        if not same:
            raise FileError(f"Not written: what went to {path} did not read back the same.")
    return path
