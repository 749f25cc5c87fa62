"""MODEL → model and tokenizer: a hub id, a local folder or a GGUF file, with the head that a task needs. Knows nothing of
adapters."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import timeit
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from deltaw.config import DType, Task
from deltaw.errors import ConfigError, FileError, first_line, nearest
from deltaw.layers.names import in_order
from deltaw.model.inputs import settle_padding, tokens_beyond, vocabulary_size

log = logging.getLogger("deltaw")


# Task → the class that opens a model for it, and what such a model is called
OPENERS: dict[str, tuple[Any, str]] = {
    "causal": (AutoModelForCausalLM, "a causal language model"),
    "seq2seq": (AutoModelForSeq2SeqLM, "a model with an encoder and a decoder"),
    "classification": (AutoModelForSequenceClassification, "a model that could classify texts"),
    "regression": (AutoModelForSequenceClassification, "a model that could score texts"),
    "image": (AutoModelForImageClassification, "a model that could classify images"),
}
HEADED = ("classification", "regression", "image")
"""Tasks whose head may be new."""


@dataclass(frozen=True)
class Pretrained:
    """A model in eval mode with its tokenizer."""

    model: Any
    tokenizer: Any
    """Of a model for images, its image processor."""
    name: str
    head: tuple[str, ...] = ()
    """Of a model with outputs for labels, the modules of its head, which are trained whole."""
    untrained: tuple[str, ...] = ()
    """Those of them that the checkpoint does not have: they are random."""
    given: bool = False
    """The tokenizer came with a model object, and may be another one than its checkpoint's."""
    base_tokenizer: Any = None
    """The base's, where an adapter has brought `tokenizer`: the base alone has no rows for tokens that are new in it."""

    def of_base(self) -> Pretrained:
        """The same model with the base's tokenizer."""
        return self if self.base_tokenizer is None else dataclasses.replace(self, tokenizer=self.base_tokenizer)


def load_pretrained(
    source: str,
    *,
    task: Task = "causal",
    labels: Sequence[str] | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    to_train: bool = False,
) -> Pretrained:
    """The model and tokenizer of `source`, with a head for the task, which for classes has an output for each of `labels`. Raises
    FileError when it is not there, is damaged, lacks weights (they would be random) besides those of a head, or is no
    model for that task.

    dtype "auto" keeps the checkpoint's precision, but float32 on a CPU and for GGUF files; `to_train` lets it be bfloat16
    where the device multiplies faster in it.
    """
    where = pick_device(device)
    arguments = locate(source)
    model_class, kind = OPENERS[task]
    try:
        tokenizer: Any = (AutoImageProcessor if task == "image" else AutoTokenizer).from_pretrained(**arguments)
        with torch.random.fork_rng(devices=[]):  # a head that the checkpoint lacks is drawn
            opened: Any = model_class.from_pretrained(
                **arguments, **_head(task, labels), dtype=_pick_dtype(dtype, where, arguments, to_train),
                output_loading_info=True, ignore_mismatched_sizes=True,  # they are in the report, which is judged below
            )  # fmt: skip
        model, info = opened[0].eval().to(where), opened[1]
    except ImportError as error:
        hint = "\nGGUF files need: pip install 'deltaw[gguf]'" if "gguf_file" in arguments else ""
        raise FileError(f"{source} needs a package that is not installed: {str(error).strip()}{hint}") from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise FileError(f"{_absent(source)}{source} cannot be loaded as {kind}: {first_line(error)}") from error
    new = _new_modules(model, info) if task in HEADED else {}
    _judge(model, info, new, source)
    if task == "causal":
        _check_causal(model, source)
    elif task != "image":
        settle_padding(model, tokenizer, pad_id(tokenizer), source, scored=task in HEADED)
    if "gguf_file" in arguments:
        _forget_gguf(model)
    return Pretrained(model, tokenizer, source, head_of(model, new) if task in HEADED else (), tuple(new))


def read_config(source: str) -> Any:
    """The model's own config. Raises FileError."""
    try:
        return AutoConfig.from_pretrained(**locate(source))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise FileError(
            f"{_absent(source)}{source} has no config that transformers knows: {first_line(error)}"
        ) from error


def _head(task: Task, labels: Sequence[str] | None) -> dict[str, Any]:
    """What a config says of a head. One of another number of classes is replaced."""
    if task not in HEADED or (labels is None and task != "regression"):
        return {}
    if task == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    names = list(labels or ())
    return {
        "num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)},
        "problem_type": "single_label_classification",
    }  # fmt: skip


def _new_modules(model: Any, info: dict[str, Any]) -> dict[str, None]:
    """The modules of its head that the checkpoint lacks, or has in another shape; and a pooler that it lacks."""
    body = f"{_body(model)}."
    heads = [key for key in info["missing_keys"] if not key.startswith(body) or "pooler" in key.split(".")]
    heads += [key for key, *_ in info["mismatched_keys"] if not key.startswith(body)]
    owners = {key.rpartition(".")[0] for key in heads}
    return dict.fromkeys(name for name, _ in model.named_modules() if name in owners)


def _judge(model: Any, info: dict[str, Any], new: Iterable[str], source: str) -> None:
    """Raise FileError for weights that would be random, but for those of `new` modules; warn of weights of the body that the
    checkpoint has and the model does not. `info` is transformers' report on loading."""
    new = set(new)
    lost = [name for name in info["missing_keys"] if name.rpartition(".")[0] not in new]
    other = [
        f"{key}: {list(there)} in the checkpoint, {list(wanted)} by its config"
        for key, there, wanted in info["mismatched_keys"]
        if key.rpartition(".")[0] not in new
    ]
    problems = [*in_order(lost), *in_order(other), *info["error_msgs"]]
    if problems:
        hints = ["Is it another kind of model (an encoder?), or is a file of it missing?"] * bool(lost)
        hints += ["Was a size in its config.json changed?"] * bool(other)
        count = "1 weight" if len(problems) == 1 else f"{len(problems)} weights"
        raise FileError(
            f"{source} lacks {count} of a {type(model).__name__}, which would be random:", problems, "\n".join(hints)
        )
    body = f"{_body(model)}."
    unread = sorted(k for k in info["unexpected_keys"] if k.startswith(body) and "pooler" not in k.split("."))
    if unread:
        log.warning(
            "%s has %d weights that a %s of this config does not read (%s …): they are left out. Was its number of layers "
            "changed?", source, len(unread), type(model).__name__, unread[0],
        )  # fmt: skip


def head_of(model: Any, new: Iterable[str] = ()) -> tuple[str, ...]:
    """The modules with parameters outside the base model, and `new` ones inside it."""
    body = _body(model)
    outside = [
        n for n, m in model.named_modules() if m._parameters and n and n != body and not n.startswith(f"{body}.")
    ]
    return tuple(dict.fromkeys([*outside, *new]))


def _body(model: Any) -> str:
    """The module that the head is put on: the base model, and where it is not under its usual name, the largest one."""
    name: str = model.base_model_prefix
    sizes = {child: sum(p.numel() for p in module.parameters()) for child, module in model.named_children()}
    return name if name in sizes else max(sizes, key=sizes.__getitem__, default=name)


def pad_id(tokenizer: Any) -> int:
    """A token to fill rows with; it is masked everywhere, so the end token serves where there is none of its own."""
    if getattr(tokenizer, "pad_token_id", None) is not None:
        return int(tokenizer.pad_token_id)
    return int(getattr(tokenizer, "eos_token_id", None) or 0)


def check_vocabulary(model: Any, tokenizer: Any, source: str, rows: int | None = None) -> None:
    """Raise ConfigError for a tokenizer with tokens of texts that there is no row of the embedding for. `rows`: how many there
    are, where an adapter of the model has others than the model."""
    known = (vocabulary_size(model) or 0) if rows is None else rows
    if beyond := tokens_beyond(tokenizer, known):
        few = ", ".join(f"{token!r} ({i})" for token, i in islice(beyond.items(), 5)) + (
            " …" if len(beyond) > 5 else ""
        )
        size = max(beyond.values()) + 1
        raise ConfigError(
            f"The tokenizer of {source} has {size:,} tokens, the model's embedding {known:,} rows: there are none for {few}.\n"
            "Use the tokenizer that the model was trained with. Or, where the tokens are meant to be new, resize the model and "
            f"save it (model.resize_token_embeddings({size})), and train their rows with tokens or whole."
        )


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


@torch.no_grad()
def resize_vocabulary(model: Any, tokens: int) -> None:
    """Give the model's embedding and head rows for so many tokens, new ones the mean of the others."""
    before = model.get_input_embeddings().weight.shape[0]
    if tokens == before:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(end, "weight", None)
        if weight is not None and len(weight) > before:
            weight[before:] = weight[:before].mean(0)


def save_pretrained(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
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
        raise FileError(f"device {device!r} cannot be used: {first_line(error)}") from error
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


def _absent(source: str) -> str:
    """The beginning of a message on a MODEL that was asked of the hub."""
    return "" if Path(source).expanduser().exists() else f"There is no folder {source} here, and on the hub: "


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
    trial tells them apart, one product of half a second where it is that slow.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    single = _seconds_of_product(torch.float32)
    return _seconds_of_product(torch.bfloat16, hopeless=_HOPELESS * single) < 0.7 * single


# Times as slow: no first product that only gets ready takes as long
_HOPELESS = 30


def _seconds_of_product(dtype: torch.dtype, hopeless: float = math.inf) -> float:
    """The least of five, fewer where one takes more than `hopeless`."""
    x, W0, least = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype), math.inf
    for _ in range(5):
        took = timeit.timeit(lambda: x @ W0, number=1)
        least = min(least, took)
        if took > hopeless:
            break
    return least


def _forget_gguf(model: Any) -> None:
    """The weights are plain tensors by now; left in place, the traces of the quantised file forbid saving them."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


# What a model folder in safetensors has: weights, config, tokenizer
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def is_hub_id(source: str) -> bool:
    """Whether a MODEL that is no file or folder is meant as a name on the hub."""
    return not Path(source).expanduser().exists() and not source.startswith((".", "/", "~")) and source.count("/") <= 1


def snapshot(name: str) -> Path:
    """The folder of the hub's cache with these files, downloaded where they are not there. Raises FileError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:  # the hub's own errors are of these
        raise FileError(f"{name} cannot be had from the hub: {first_line(error)}") from error
