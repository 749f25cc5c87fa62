"""MODEL → model and tokenizer: a hub id, a local folder or a GGUF file. Knows nothing of adapters."""

from __future__ import annotations

import functools
import json
import logging
import timeit
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.config import DType
from deltaw.errors import FileError, listing, nearest

log = logging.getLogger("deltaw")


@dataclass(frozen=True)
class Pretrained:
    """A causal language model in eval mode with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str


def load_pretrained(source: str, *, dtype: DType = "auto", device: str = "auto", to_train: bool = False) -> Pretrained:
    """The model and tokenizer of `source`. Raises FileError when it is not there, is damaged, lacks weights (they would be
    random), or is no causal language model.

    dtype "auto" keeps the checkpoint's precision, but float32 on a CPU and for GGUF files; `to_train` lets it be bfloat16
    where the device multiplies faster in it.
    """
    where = pick_device(device)
    arguments = locate(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
        opened: Any = AutoModelForCausalLM.from_pretrained(
            **arguments, dtype=_pick_dtype(dtype, where, arguments, to_train), output_loading_info=True
        )
        model, info = opened[0].eval().to(where), opened[1]
    except ImportError as error:
        raise FileError(
            f"{source} needs a package that is not installed: {error}\nGGUF files need: pip install 'deltaw[gguf]'"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise FileError(f"{source} cannot be loaded as a causal language model: {_first_line(error)}") from error
    if info["missing_keys"]:
        lost = sorted(info["missing_keys"])
        raise FileError(
            listing(f"{source} lacks {len(lost)} weights of a {type(model).__name__}, which would be random:", lost)
            + "\nIs it another kind of model (an encoder?), or is a file of it missing?"
        )
    _check_causal(model, source)
    if "gguf_file" in arguments:
        _forget_gguf(model)
    return Pretrained(model, tokenizer, source)


@torch.no_grad()
def _check_causal(model: Any, source: str) -> None:
    """Raise FileError when logits depend on later tokens: such a model would learn to copy its targets from its input."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(8, device=model.device) % vocabulary).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % vocabulary
    one, other = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    if (one - other).abs().max() > 0.01 * one.abs().max():
        raise FileError(
            f"{source} is no causal language model: its {type(model).__name__} attends to later tokens as well (an encoder). "
            "It would see the very tokens that it is to predict."
        )


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """An ordinary Hugging Face folder: config, safetensors, tokenizer. Not atomic: the caller gives a fresh folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pick_device(device: str) -> torch.device:
    """auto is CUDA, then Apple's MPS, then the CPU. Raises FileError for a device that is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise FileError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    return chosen


def locate(source: str) -> dict[str, Any]:
    """Arguments of from_pretrained. What looks like a path but is not there is said so, not asked of the hub."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileError(f"{source} is a file, but no GGUF file. MODEL is a hub id, a model folder or a .gguf file.")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(path.glob("*.gguf"))
            if len(ggufs) == 1:
                return {"pretrained_model_name_or_path": str(path), "gguf_file": ggufs[0].name}
            raise FileError(f"{source} is a folder without config.json, so it is no model folder{_adapter_hint(path)}.")
        return {"pretrained_model_name_or_path": str(path)}
    if source.startswith((".", "/", "~")) or source.endswith(".gguf") or source.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileError(f"There is no model at {source}{nearest(path.name, siblings)}.")
    return {"pretrained_model_name_or_path": source}


def _adapter_hint(path: Path) -> str:
    if not (path / "adapter_config.json").is_file():
        return ""
    base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    return f"; it is an adapter of {base or 'some base'}: give the base as MODEL and this folder with --adapter"


def _pick_dtype(dtype: DType, device: torch.device, arguments: dict[str, Any], to_train: bool) -> torch.dtype | str:
    if dtype != "auto":
        return getattr(torch, dtype)
    if to_train and bfloat16_pays(device):
        return torch.bfloat16
    if device.type == "cpu" or "gguf_file" in arguments:
        return torch.float32
    return AutoConfig.from_pretrained(**arguments).dtype or "auto"


@functools.cache
def bfloat16_pays(device: torch.device) -> bool:
    """Whether the device's products of the size of a training step are clearly faster in bfloat16 than in float32.

    CUDA says so itself. Of CPUs only those with bfloat16 instructions are faster, and the others many times slower, so a
    few milliseconds of trial tell them apart.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, W0 = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times[dtype] = min(timeit.repeat(lambda x=x, W0=W0: x @ W0, number=1, repeat=5))  # type: ignore[misc]
    return times[torch.bfloat16] < 0.7 * times[torch.float32]


def _forget_gguf(model: Any) -> None:
    """The weights are plain tensors by now; left in place, the traces of the quantised file forbid saving them."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
