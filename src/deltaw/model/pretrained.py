"""MODEL → model and tokenizer: from a hub id, a local folder or a GGUF file, with the head that a task needs.

Knows nothing of adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import timeit
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

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
)

from deltaw.config import DType, Task
from deltaw.errors import ConfigError, DeltaWError, FileError, first_line, nearest, needs_its_code, shown
from deltaw.layers.names import in_order
from deltaw.layers.tree import is_finite
from deltaw.model.inputs import settle_padding, tokens_beyond, vocabulary_size
from deltaw.model.switch import base_not_finite

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("deltaw")

_AutoClass = type[
    AutoModelForCausalLM | AutoModelForSeq2SeqLM | AutoModelForSequenceClassification | AutoModelForImageClassification
]
# Task → the class that opens a model for it, and the kind of model for messages
OPENERS: dict[str, tuple[_AutoClass, str]] = {
    "causal": (AutoModelForCausalLM, "a causal language model"),
    "seq2seq": (AutoModelForSeq2SeqLM, "a model with an encoder and a decoder"),
    "classification": (AutoModelForSequenceClassification, "a model that could classify texts"),
    "regression": (AutoModelForSequenceClassification, "a model that could score texts"),
    "image": (AutoModelForImageClassification, "a model that could classify images"),
}
HEADED = ("classification", "regression", "image")
"""Tasks whose head may be new."""


class Location(TypedDict):
    """The arguments by which from_pretrained finds a model."""

    pretrained_model_name_or_path: str
    trust_remote_code: bool
    """Always given: where it is missing, transformers asks on the terminal, and a pipe may answer."""
    gguf_file: NotRequired[str]


class Head(TypedDict, total=False):
    """The fields of a config that describe a head."""

    num_labels: int
    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str


class LoadingInfo(TypedDict):
    """transformers' report on loading a checkpoint."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, Sequence[int], Sequence[int]]]
    """Name, shape in the checkpoint, shape by the config."""
    error_msgs: list[str]


@dataclass(frozen=True)
class Pretrained:
    """A model in eval mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    """A PreTrainedTokenizerBase; for a model of images an image processor, and None if steps are only planned."""
    name: str
    head: tuple[str, ...] = ()
    """The modules of a head with outputs for labels, which are trained whole."""
    untrained: tuple[str, ...] = ()
    """Modules of the head that the checkpoint lacks: they are random."""
    handed_over: bool = False
    """The tokenizer was handed over with a model object, and may differ from its checkpoint's."""
    base_tokenizer: PreTrainedTokenizerBase | None = None
    """The base's tokenizer, if `tokenizer` is an adapter's: the base alone has no rows for its new tokens."""
    trust_remote_code: bool = False
    """Python code that comes with the model, or with a tokenizer beside its adapter, may run."""

    def of_base(self) -> Pretrained:
        """Return the same model with the base's tokenizer."""
        return self if self.base_tokenizer is None else dataclasses.replace(self, tokenizer=self.base_tokenizer)


def load_pretrained(
    source: str,
    *,
    task: Task = "causal",
    labels: Sequence[str] | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    to_train: bool = False,
    trust_remote_code: bool = False,
) -> Pretrained:
    """Return the model and tokenizer of `source`, with a head for the task.

    A head for classes has an output for each of `labels`. dtype "auto" keeps the checkpoint's precision, but is float32 on a
    CPU and for GGUF files. With `to_train` it is bfloat16 if the device multiplies faster in it. With `trust_remote_code`,
    Python code in the model's folder or hub repository runs.

    Raises FileError if the model is not there, is damaged, is no model for that task, or lacks weights besides those of a head:
    these would be random. Raises it too for a model that needs its own code, without `trust_remote_code`.
    """
    where = pick_device(device)
    arguments = locate(source, trust_remote_code=trust_remote_code)
    model_class, kind = OPENERS[task]
    try:
        tokenizer: Any = (AutoImageProcessor if task == "image" else AutoTokenizer).from_pretrained(**arguments)
        in_dtype = _pick_dtype(dtype, where, arguments, to_train)
        model, info = _open(model_class, arguments, _head(task, labels), in_dtype, where)
    except ImportError as error:
        hint = "\nGGUF files need: pip install 'deltaw[gguf]'" if "gguf_file" in arguments else ""
        raise FileError(f"{source} needs a package that is not installed: {str(error).strip()}{hint}") from error
    except Exception as error:
        raise _refusal(source, error, f"cannot be loaded as {kind}", trust_remote_code) from error
    if not trust_remote_code:
        _warn_of_code(model, tokenizer, source)
    new = _new_modules(model, info) if task in HEADED else ()
    _judge(model, info, new, source)
    if task == "causal":
        _check_causal(model, source)
    elif task != "image":
        settle_padding(model, tokenizer, pad_id(tokenizer), source, scored=task in HEADED)
    if "gguf_file" in arguments:
        _forget_gguf(model)
    head = head_of(model, new) if task in HEADED else ()
    return Pretrained(model, tokenizer, source, head, new, trust_remote_code=trust_remote_code)


_ON_OPENING = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""Errors by which transformers refuses a model."""


def _refusal(source: str, error: Exception, what: str, trust_remote_code: bool) -> FileError:
    """Return our error for transformers' one. Raises an error of ours as it is, and one that is a fault of the code.

    The model's own code, where that runs, may raise any.
    """
    if isinstance(error, DeltaWError) or not (trust_remote_code or isinstance(error, _ON_OPENING)):
        raise error
    if not trust_remote_code and (refused := needs_its_code(source, error)) is not None:
        return refused
    if "Unrecognized configuration class" in str(error):  # a list of all classes follows
        return FileError(f"{source} {what}: it is of another kind. Leave --task out, or give a model for that task.")
    return FileError(f"{_absent(source)}{source} {what}: {first_line(error)}")


def _warn_of_code(model: PreTrainedModel, tokenizer: object, source: str) -> None:
    """Warn of code beside the weights that was not run, as transformers has its own for that kind of model."""
    if getattr(model.config, "auto_map", None) or getattr(tokenizer, "init_kwargs", {}).get("auto_map"):
        log.warning(
            "%s comes with Python code, which is not run: transformers' own %s takes its place. --trust-remote-code runs it.",
            source, type(model).__name__,
        )  # fmt: skip


def _open(
    model_class: _AutoClass, location: Location, head: Head, dtype: torch.dtype | str, device: torch.device
) -> tuple[PreTrainedModel, LoadingInfo]:
    """Open a model; return it with the report on its weights, in which those of other shapes stand as well."""
    opened: Any
    with torch.random.fork_rng(devices=[]):  # a head that the checkpoint lacks is drawn
        opened = model_class.from_pretrained(
            **location, **head, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, weights_only=True
        )
    return opened[0].eval().to(device), opened[1]


def read_config(source: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the model's config. Raises FileError if there is none, or if it needs the model's code without the flag for it."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(**locate(source, trust_remote_code=trust_remote_code))
        return config
    except Exception as error:
        raise _refusal(source, error, "has no config that transformers knows", trust_remote_code) from error


def _head(task: Task, labels: Sequence[str] | None) -> Head:
    """Return what the config is to say of the head. A checkpoint's head of another number of classes is replaced."""
    if task not in HEADED or (labels is None and task != "regression"):
        return {}
    if task == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    names = list(labels or ())
    return {
        "num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)},
        "problem_type": "single_label_classification",
    }  # fmt: skip


def _new_modules(model: PreTrainedModel, info: LoadingInfo) -> tuple[str, ...]:
    """Return the modules of the head that the checkpoint lacks or has in another shape, and a pooler that it lacks."""
    body = f"{_body(model)}."
    heads = [key for key in info["missing_keys"] if not key.startswith(body) or "pooler" in key.split(".")]
    heads += [key for key, *_ in info["mismatched_keys"] if not key.startswith(body)]
    owners = {key.rpartition(".")[0] for key in heads}
    return tuple(name for name, _ in model.named_modules() if name in owners)


_OTHER_KIND = (
    "Is it another kind of model, or is a file of it missing? An encoder learns classes or numbers: its records have text and "
    "label (--columns label=FIELD names another field)."
)


def _judge(model: PreTrainedModel, info: LoadingInfo, new: Iterable[str], source: str) -> None:
    """Raise FileError for weights that would be random, except those of `new` modules.

    Warn of weights of the body that the checkpoint has and the model does not.
    """
    new = set(new)
    lost = [name for name in info["missing_keys"] if name.rpartition(".")[0] not in new]
    other = [
        f"{key}: {list(there)} in the checkpoint, {list(wanted)} by its config"
        for key, there, wanted in info["mismatched_keys"]
        if key.rpartition(".")[0] not in new
    ]
    problems = [*in_order(lost), *in_order(other), *info["error_msgs"]]
    if problems:
        hints = [_OTHER_KIND] * bool(lost)
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


def head_of(model: PreTrainedModel, new: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the modules with parameters outside the base model, and `new` ones inside it."""
    body = _body(model)
    outside = [
        n for n, m in model.named_modules() if m._parameters and n and n != body and not n.startswith(f"{body}.")
    ]
    return tuple(dict.fromkeys([*outside, *new]))


def _body(model: PreTrainedModel) -> str:
    """Return the name of the module below the head: the base model, or the largest one if that has not its usual name."""
    name = model.base_model_prefix
    sizes = {child: sum(p.numel() for p in module.parameters()) for child, module in model.named_children()}
    return name if name in sizes else max(sizes, key=sizes.__getitem__, default=name)


def pad_id(tokenizer: object) -> int:
    """Return the token that pads rows: the end token if the tokenizer has none for it, since padding is masked everywhere."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return int(pad if pad is not None else getattr(tokenizer, "eos_token_id", None) or 0)


def check_vocabulary(model: nn.Module, tokenizer: object, source: str, rows: int | None = None) -> None:
    """Raise ConfigError for a tokenizer with tokens of texts that the embedding has no row for.

    `rows` is the number of rows if an adapter brings another one than the model has.
    """
    known = (vocabulary_size(model) or 0) if rows is None else rows
    if beyond := tokens_beyond(tokenizer, known):
        few = shown([f"{token!r} ({i})" for token, i in beyond.items()], 5)
        size = max(beyond.values()) + 1
        raise ConfigError(
            f"The tokenizer of {source} has {size:,} tokens, the model's embedding {known:,} rows: there are none for {few}.\n"
            "Use the tokenizer that the model was trained with. Or, where the tokens are meant to be new, resize the model and "
            f"save it in Python (model.resize_token_embeddings({size})), and train their rows: by --tokens or --whole on the "
            "command line, LoRA(tokens=…) or LoRA(whole=…) in Python."
        )


@torch.no_grad()
def _check_causal(model: PreTrainedModel, source: str) -> None:
    """Raise FileError if logits depend on later tokens: such a model would learn to copy its targets from its input.

    Raises it too if they are not finite.
    """
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.num_embeddings
    ids = (torch.arange(8, device=model.device) % vocabulary).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % vocabulary
    one, other = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    if not (is_finite(one) and is_finite(other)):
        raise base_not_finite(model, source)
    if (one - other).abs().max() > 0.01 * one.abs().max():
        raise FileError(
            f"{source} is no causal language model: its {type(model).__name__} attends to later tokens as well (an encoder). "
            "It would see the very tokens that it is to predict."
        )


@torch.no_grad()
def resize_vocabulary(model: PreTrainedModel, tokens: int) -> None:
    """Give the model's embedding and head rows for so many tokens; new rows are the mean of the others."""
    embedding: Any = model.get_input_embeddings()
    before = embedding.weight.shape[0]
    if tokens == before:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[no-untyped-call]
        weight = getattr(end, "weight", None)
        if weight is not None and len(weight) > before:
            weight[before:] = weight[:before].mean(0)


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary Hugging Face folder: config, safetensors, tokenizer. It is not atomic; the caller names a fresh
    folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pick_device(device: str) -> torch.device:
    """Return the device of this name; "auto" is CUDA, else Apple's MPS, else the CPU. Raises ConfigError if it is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {device!r} cannot be used: {first_line(error)}") from error
    return chosen


def locate(source: str, *, trust_remote_code: bool = False) -> Location:
    """Return the arguments by which from_pretrained finds a model, and whether it may run the model's code.

    Raises FileError for a file or folder that holds no model, and for a path that is not there: the hub is not asked for it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileError(f"{source} is a file, but no GGUF file. MODEL is a hub id, a model folder or a .gguf file.")
        return _at(path.parent, trust_remote_code, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(path.glob("*.gguf"))
            if len(ggufs) == 1:
                return _at(path, trust_remote_code, ggufs[0].name)
            raise FileError(f"{source} is a folder without config.json, so it is no model folder{_adapter_hint(path)}.")
        return _at(path, trust_remote_code)
    if source.startswith((".", "/", "~")) or source.endswith(".gguf") or source.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileError(f"There is no model at {source}{nearest(path.name, siblings)}.")
    return _at(source, trust_remote_code)


def _at(place: str | Path, trust_remote_code: bool, gguf_file: str | None = None) -> Location:
    location: Location = {"pretrained_model_name_or_path": str(place), "trust_remote_code": trust_remote_code}
    return location if gguf_file is None else {**location, "gguf_file": gguf_file}


def _absent(source: str) -> str:
    """Return the beginning of a message on a MODEL that was looked for on the hub; empty for a local one."""
    return "" if Path(source).expanduser().exists() else f"There is no folder {source} here, and on the hub: "


def _adapter_hint(path: Path) -> str:
    """Return the end of a message if the folder is an adapter's."""
    if not (path / "adapter_config.json").is_file():
        return ""
    try:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):  # its settings are another command's subject
        base = None
    return f"; it is an adapter of {base or 'some base'}: give the base as MODEL and this folder with --adapter"


def _pick_dtype(dtype: DType, device: torch.device, location: Location, to_train: bool) -> torch.dtype | str:
    """Return the dtype to load in, or "auto" for that of the weights in the checkpoint."""
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if to_train and bfloat16_pays(device):
        return torch.bfloat16
    if device.type == "cpu" or "gguf_file" in location:
        return torch.float32
    of_config: torch.dtype | None = AutoConfig.from_pretrained(**location).dtype
    return of_config or "auto"


@functools.cache
def bfloat16_pays(device: torch.device) -> bool:
    """Return whether the device multiplies clearly faster in bfloat16 than in float32.

    CUDA tells. CPUs with bfloat16 instructions are faster in it, the others many times slower, so a trial of products of a
    training step's size tells them apart. It stops after one product that is hopelessly slow.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    single = _seconds_of_product(torch.float32)
    return _seconds_of_product(torch.bfloat16, hopeless=_HOPELESS * single) < 0.7 * single


_HOPELESS = 30
"""A first product so many times slower is given up; one that only warms up is never that slow."""


def _seconds_of_product(dtype: torch.dtype, hopeless: float = math.inf) -> float:
    """Return the least time of five products, or of fewer if one takes more than `hopeless` seconds."""
    x, W0, least = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype), math.inf
    for _ in range(5):
        took = timeit.timeit(lambda: x @ W0, number=1)
        least = min(least, took)
        if took > hopeless:
            break
    return least


def _forget_gguf(model: PreTrainedModel) -> None:
    """Remove the traces of a quantised file, which forbid saving the weights though they are plain tensors by now."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model).update(hf_quantizer=None, is_quantized=False)


# Files of a model folder in safetensors: weights, config, tokenizer
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def is_hub_id(source: str) -> bool:
    """Return whether MODEL is meant as a name on the hub: it is no file or folder, and does not look like a path."""
    return not Path(source).expanduser().exists() and not source.startswith((".", "/", "~")) and source.count("/") <= 1


def snapshot(name: str) -> Path:
    """Return the folder of the hub's cache with a model's files, downloaded if they are not there. Raises FileError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:  # the bases of the hub's errors
        raise FileError(f"{name} cannot be had from the hub: {first_line(error)}") from error
