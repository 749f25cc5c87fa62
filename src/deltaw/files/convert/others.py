"""Adapters of mlx-lm, kohya and LyCORIS, litgpt, torchtune and ONNX Runtime ↔ PEFT's folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltaw.errors import ConfigError, FileError, shown
from deltaw.files.convert.base import base_config, layers_of
from deltaw.files.convert.gguf import halves
from deltaw.files.convert.places import check_is_adapter
from deltaw.files.formats import peft
from deltaw.files.formats.others import Foreign, kohya, litgpt, mlx_lm, onnx_adapter, torchtune
from deltaw.files.formats.others.foreign import check_layers, refuse
from deltaw.files.formats.peft import LoRAFile
from deltaw.files.formats.peft.metadata import base_in, transposed_layers
from deltaw.files.formats.strict_json import read_object

log = logging.getLogger("deltaw")

Base = str | Path | nn.Module | None


def read(
    src: Path, form: str, *, alpha: float | None, parts: Sequence[str], base: Base, trust_remote_code: bool
) -> Foreign:
    """Read an adapter of another program, and compare it with the base where that is there.

    Args:
        src: the file, or the folder.
        form: the program, as FORMATS of adapters.py has it.
        alpha: α, where the file has none.
        parts: which of query, key and value have updates (litgpt); which of several models is meant (kohya).
        base: the base. kohya's and torchtune's files cannot be read without.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        ConfigError: without a base where one is needed.
        FileError: with everything wrong in the file, and every layer that does not fit the base.
    """
    layers = None if base is None else layers_of(base, trust_remote_code)
    if form == "kohya":
        if layers is None:
            raise ConfigError(
                f"{src} has names of layers with underscores for dots: give the base that it belongs to (command line: --base; "
                "in Python also as a model), which has the names."
            )
        if len(parts) > 1:
            raise ConfigError(
                f"parts is {', '.join(parts)}: of a file with several models an adapter is of one. Convert once for each."
            )
        return kohya.read(src, layers, model=parts[0] if parts else None)
    if form == "torchtune":
        adapter = torchtune.read(src, alpha=alpha, reorder=_reorder(src, base, trust_remote_code))
    elif form == "litgpt":
        adapter = litgpt.read(src, alpha=alpha, parts=_letters(parts), heads=_heads(base, trust_remote_code))
    else:
        adapter = mlx_lm.read(src) if form == "mlx-lm" else onnx_adapter.read(src)
    if layers is not None:
        refuse(src, check_layers(layers, adapter))
    if form == "mlx-lm":
        refuse(src, _of_tied(src, adapter, base or adapter.base))
    return adapter


def write(src: Path, dst: Path, form: str, base: Base = None) -> Path:
    """Write a PEFT folder for mlx-lm or ONNX Runtime. Raises FileError with all that it has no form for there."""
    file = peft.read(src)
    if form == "onnx_adapter":
        check_is_adapter(dst, lambda: onnx_adapter.read(dst))
    problems = [f"{name}: a parameter that was trained whole" for name in file.whole]
    problems += [f"{layer}: rows of some tokens" for layer in file.rows]
    problems += [f"{layer}: a bias that its base has none of" for layer in file.biases]
    problems += [f"{layer}: a convolution" for layer in file.kernels]
    problems += [f"{file.shown(layer)}: a stack of matrices" for layer in file.factors if file.is_stack(layer)]
    problems += [f"{layer}: GPT-2's Conv1D, whose names and weights are others there" for layer in _transposed(file)]
    if form == "onnx_adapter":
        problems += [f"{layer}: DoRA's magnitude" for layer in file.magnitudes]
        problems += [f"{layer}: an embedding" for layer in sorted(file.embeddings)]
    else:
        problems += [f"{layer}: an embedding, under DoRA" for layer in sorted(file.embeddings) if file.magnitudes]
        named = Foreign("deltaw", file.factors, embeddings=set(file.embeddings))
        problems += _of_tied(src, named, base or base_in(file.metadata, file.config.base_model_name_or_path))
    if problems:
        raise FileError(f"{form} has no form for what is in {src} (deltaw merge writes a whole model):", problems)
    if file.copies:
        log.warning(
            "Left out, as the base's own values, which PEFT keeps beside an update: %s.", shown(sorted(file.copies))
        )
    adapter = Foreign(
        "deltaw", file.factors, file.scales, embeddings=set(file.embeddings), magnitudes=file.magnitudes,
        dropout=file.config.lora_dropout, base=file.config.base_model_name_or_path, ends=peft.ends_of(file.metadata, src),
    )  # fmt: skip
    if ends := _own_ends(adapter.ends, base or base_in(file.metadata, file.config.base_model_name_or_path)):
        log.warning("%s was taught to end with %s: tell the program that runs it.", src, ends)
    return mlx_lm.write(dst, adapter) if form == "mlx-lm" else onnx_adapter.write(dst, adapter)


def _own_ends(ends: Sequence[int], base: Base) -> str:
    """Return the tokens that end an adapter's answers, as texts where the base is here; "" where the base ends so too."""
    if not ends:
        return ""
    if not isinstance(base, str | Path) or not Path(base).is_dir():
        return f"the {'token' if len(ends) == 1 else 'tokens'} {', '.join(map(str, ends))}"
    known, vocabulary = _ends_of(Path(base)), Path(base) / "tokenizer.json"
    beyond = [end for end in ends if end not in known]
    texts = [_text_of(end, vocabulary) if vocabulary.is_file() else "the token" for end in beyond]
    return " and ".join(f"{text} ({end})" for text, end in zip(texts, beyond, strict=True))


def _text_of(token: int, vocabulary: Path) -> str:
    """Return a token's text, by a tokenizer's file."""
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(vocabulary)).id_to_token(token))


def _ends_of(base: Path) -> set[int]:
    """Return the tokens that end an answer of a model, by its settings."""
    known: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file():
            ends: Any = read_object(base / name).get("eos_token_id")
            known |= set(ends if isinstance(ends, list) else [ends])
    return known


def _of_tied(src: Path, adapter: Foreign, base: Base) -> list[str]:
    """List the layers that mlx-lm and PEFT compute otherwise in a model whose head is tied to its embedding.

    mlx-lm's embedding is the head too there, with its update; PEFT's update is of the one layer alone. Where the base is not
    here that is logged.
    """
    heads = [layer for layer in adapter.factors if layer.rpartition(".")[2] == "lm_head"]
    layers = [*heads, *sorted(adapter.embeddings)]
    if not layers:
        return []
    if not isinstance(base, nn.Module) and not (base and Path(base).is_dir()):
        log.warning(
            "%s has updates of %s. In a model whose head is tied to its embedding mlx-lm computes these otherwise than PEFT: "
            "give the base to have that checked (command line: --base).", src, ", ".join(layers),
        )  # fmt: skip
        return []
    config: Any = base.config if isinstance(base, nn.Module) else base_config(base)
    if not getattr(config, "tie_word_embeddings", False):
        return []
    problems = [f"{layer}: the base ties it to the embedding, and mlx-lm has no such layer then" for layer in heads]
    problems += [
        f"{layer}: the base ties its head to it, which the update changes too in mlx-lm, and not in PEFT"
        for layer in sorted(adapter.embeddings)
    ]
    return problems


def _transposed(file: LoRAFile) -> list[str]:
    """Return the layers that are stored [k, d]. A foreign file says that with one setting for all dense layers."""
    layers = transposed_layers(file.metadata)
    if layers is not None:
        return sorted(layers)
    dense = [n for n in file.factors if n not in file.embeddings and n not in file.kernels]
    return dense if file.config.settings.get("fan_in_fan_out") else []


def _letters(parts: Sequence[str]) -> list[str]:
    """Return parts as letters, also where they are a digit each."""
    if len(parts) == 1 and set(parts[0]) <= {"0", "1"}:
        return [letter for letter, digit in zip("qkv", parts[0], strict=False) if digit == "1"]
    return list(parts)


def _counts(base: str | Path | nn.Module, trust_remote_code: bool) -> tuple[str, int, int, int]:
    """Return a base's model_type, its numbers of heads of queries and of keys, and the rows of each."""
    config: Any = base.config if isinstance(base, nn.Module) else base_config(base, trust_remote_code)
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    return str(config.model_type), heads, int(getattr(config, "num_key_value_heads", None) or heads), int(size)


def _heads(base: Base, trust_remote_code: bool) -> litgpt.Heads | None:
    """Return the rows of query, key and value of a base."""
    if base is None:
        return None
    _, heads, groups, size = _counts(base, trust_remote_code)
    return litgpt.Heads(heads * size, groups * size, groups * size)


def _reorder(src: Path, base: Base, trust_remote_code: bool) -> torchtune.Reorder:
    """Return what puts torchtune's rows into transformers' order.

    Raises ConfigError without a base, FileError for models whose order is not known.
    """
    if base is None:
        raise ConfigError(
            f"{src} has the rows of queries and keys in torchtune's order: give the base (command line: --base), whose config "
            "has the numbers of heads."
        )
    kind, heads, groups, _ = _counts(base, trust_remote_code)
    if kind not in torchtune.ORDERS:
        raise FileError(
            f"{base if not isinstance(base, nn.Module) else 'The base'} is a {kind!r}; torchtune's files are converted for "
            f"{', '.join(torchtune.ORDERS)}. For others convert the adapter_model file that torchtune writes beside, "
            "which is PEFT's."
        )

    def reorder(layer: str, B: Tensor) -> Tensor:
        count = {"q_proj": heads, "k_proj": groups}.get(layer.rpartition(".")[2])
        # torchtune's order of rotary pairs is llama.cpp's. Rows that make no pairs are told with the base's shapes
        return halves(B, count, back=True) if count and torchtune.ORDERS[kind] and B.shape[0] % (2 * count) == 0 else B

    return reorder
