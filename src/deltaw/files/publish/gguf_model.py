"""A model folder → a GGUF file for llama.cpp and Ollama, one tensor in memory at a time. Needs the gguf package; opens no model.

Names of tensors and keys are the gguf package's. What llama.cpp's own conversion of these architectures does beside renaming is
done here too: rows of q and k in pairs (llama), Llama 3's factors of frequencies as a tensor, matrices in the chosen type,
vectors in float32.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from deltaw.errors import FileError
from deltaw.files.convert import ARCHITECTURES, base_config, halves
from deltaw.files.formats import gguf as package_of
from deltaw.files.formats import model_folder
from deltaw.files.formats.atomic import replacing_folder, sign
from deltaw.files.formats.safetensors import Shard, read_tensor, shards_of
from deltaw.files.publish.gguf_tokens import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig

log = logging.getLogger("deltaw")

GGUFType = Literal["q8_0", "q4_0", "f16", "f32"]
NAME, MODELFILE = "model.gguf", "Modelfile"
# Entries that one scale is shared by in Q8_0 and Q4_0
_BLOCK = 32
# Their rounding shows in every token: llama.cpp's own 4-bit files keep them in more bits, too
_FINER = ("token_embd.weight", "output.weight")
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Exported:
    """A model that was written as GGUF."""

    file: Path
    bytes: int
    arch: str
    """llama.cpp's name of the architecture."""
    tensors: int
    kept: list[str]
    """Matrices in float16 since their rows have no whole blocks of Q8_0 or Q4_0."""


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    kind: GGUFType = "q8_0",
    system: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a folder with a GGUF file of a model and a Modelfile, atomically; the file is read back and compared.

    Args:
        model: a model folder in safetensors, with a byte-level BPE tokenizer.
        out: the folder to write; one that deltaw wrote is replaced.
        kind: how matrices are stored. Vectors are float32; of q4_0 the embedding and the head are q8_0.
        system: the system message of every conversation that has none, for the Modelfile.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        ConfigError: for an `out` that is, holds or lies in the model's folder, or holds what deltaw did not write.
        FileError: for an architecture, rotary positions or a tokenizer that llama.cpp is not known to compute alike, and for
            files that cannot be read or written.
    """
    model, out = Path(model), Path(out)
    model_folder.check_place(out, {"the model": model})
    plan = _planned(model, kind)
    words = vocabulary_of(model, int(plan.config.vocab_size), trust_remote_code=trust_remote_code)
    with replacing_folder(out) as folder:
        hashes = _write(folder / NAME, plan, words)
        if (lost := _differing(folder / NAME, hashes)) is not None:
            raise FileError(f"{out} could not be written whole ({lost}): the disk may be full.")
        (folder / MODELFILE).write_text(modelfile(words, system), encoding="utf-8")
        size = (folder / NAME).stat().st_size
        sign(folder)
    return Exported(out / NAME, size, plan.arch, len(hashes), plan.kept)


def modelfile(words: Vocabulary, system: str | None = None) -> str:
    """Return Ollama's description of the model: the file, the texts that end an answer, the system message.

    The chat template is in the file.
    """
    stops = [f"PARAMETER stop {_quoted(words.tokens[i])}" for i in words.ends]
    message = [] if system is None else [f'SYSTEM """{system}"""']
    return "\n".join([f"FROM ./{NAME}", *stops, *message]) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


# --- what goes into the file ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The tensors of the file, by their names there."""

    config: PretrainedConfig
    arch: str
    kind: GGUFType
    sources: dict[str, tuple[Shard, str]]
    """Name in the file → the shard and the name there."""
    extra: dict[str, Tensor]
    kept: list[str]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name, tensor; float32, with rows in llama.cpp's order."""
        yield from self.extra.items()
        heads = {"attn_q.": self.config.num_attention_heads, "attn_k.": self.config.num_key_value_heads}
        permuted = ARCHITECTURES[self.config.model_type][1]
        for name, (shard, source) in self.sources.items():
            with shard.path.open("rb") as stream:
                tensor = read_tensor(stream, shard.entries[source])[1].float()
            count = next((n for part, n in heads.items() if part in name), None) if permuted else None
            yield name, tensor if count is None else halves(tensor, count, False)

    def type_of(self, name: str, shape: tuple[int, ...]) -> GGUFType:
        """Return how a tensor is stored."""
        if len(shape) < 2:
            return "f32"
        if name in self.kept:
            return "f16"
        return "q8_0" if self.kind == "q4_0" and name in _FINER else self.kind


def exportable(model: Path) -> PretrainedConfig:
    """Return the config of a model that can be written. Raises FileError with all that speaks against it."""
    config = base_config(model)
    if config.model_type not in ARCHITECTURES:
        raise FileError(
            f"{model} is a {config.model_type!r}; GGUF files are written for {', '.join(ARCHITECTURES)}. llama.cpp's own "
            "convert_hf_to_gguf.py takes a merged folder of any other."
        )
    if problems := _problems(config):
        raise FileError(f"{model} cannot be written as GGUF:", problems)
    return config


def _planned(model: Path, kind: GGUFType) -> _Plan:
    """Return what goes into the file. Raises FileError with everything that llama.cpp has no form for."""
    package, config, problems = package_of.package(), exportable(model), list[str]()
    arch = ARCHITECTURES[config.model_type][0]
    number = {name: value for value, name in package.MODEL_ARCH_NAMES.items()}[arch]
    table = package.get_tensor_name_map(number, config.num_hidden_layers)
    sources: dict[str, tuple[Shard, str]] = {}
    for shard in shards_of(model):
        for name in shard.entries:
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
                continue
            theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                problems.append(f"{name} is none of the tensors of {arch!r}")
            else:
                sources[theirs] = shard, name
    if problems:
        raise FileError(f"{model} cannot be written as GGUF:", problems)
    shapes = {name: shard.entries[source].shape for name, (shard, source) in sources.items()}
    kept = [n for n, shape in shapes.items() if kind in ("q8_0", "q4_0") and len(shape) > 1 and shape[-1] % _BLOCK]
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        log.warning("Attention within %d tokens is not in the file: llama.cpp attends to all.", config.sliding_window)
    factors = _frequency_factors(config)
    return _Plan(config, arch, kind, sources, {} if factors is None else {"rope_freqs.weight": factors}, kept)


def _problems(config: PretrainedConfig) -> list[str]:
    """List settings that llama.cpp would not follow."""
    problems = []
    named = (config.architectures or [""])[0]
    if not named.endswith("ForCausalLM"):
        problems.append(f"it is a {named or 'model of no class'}; llama.cpp runs causal language models")
    if config.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act is {config.hidden_act!r}; llama.cpp computes silu there")
    rope = config.rope_parameters
    if rope.get("rope_type") not in ("default", "linear", "llama3"):
        problems.append(f"rope_type is {rope.get('rope_type')!r}; default, linear and llama3 are written")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial_rotary_factor is not 1")
    return problems


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _frequency_factors(config: PretrainedConfig) -> Tensor | None:
    """Return by what llama.cpp divides the frequency of each pair [head_dim / 2], for Llama 3's scaling; else None."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    exponents = torch.arange(0, _head_dim(config), 2, dtype=torch.float64) / _head_dim(config)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    original = rope["original_max_position_embeddings"]
    factors = torch.where(wavelengths > original / low, torch.full_like(wavelengths, factor), between)
    return torch.where(wavelengths < original / high, torch.ones_like(wavelengths), factors).float()


# --- the file ---------------------------------------------------------------------------------------------------


def _write(path: Path, plan: _Plan, words: Vocabulary) -> dict[str, str]:
    """Write the file. Return name of each tensor → sha256 of its bytes."""
    package = package_of.package()
    writer = package.GGUFWriter(path, plan.arch)
    _add_settings(writer, plan)
    words.add_to(writer)
    shapes = {name: tuple(tensor.shape) for name, tensor in plan.extra.items()}
    shapes |= {name: tuple(shard.entries[source].shape) for name, (shard, source) in plan.sources.items()}
    for name, shape in shapes.items():
        stored = package.GGMLQuantizationType[plan.type_of(name, shape).upper()]
        in_bytes = package.quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(name, in_bytes, _uint8(), math.prod(in_bytes), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    hashes = {}
    for name, tensor in plan.tensors():
        data = _encoded(name, tensor, plan.type_of(name, shapes[name]))
        hashes[name] = hashlib.sha256(data.tobytes()).hexdigest()
        writer.write_tensor_data(data)
    writer.close()
    return hashes


def _uint8() -> np.dtype[Any]:
    import numpy as np

    return np.dtype(np.uint8)


def _encoded(name: str, tensor: Tensor, kind: GGUFType) -> np.ndarray[Any, Any]:
    """Return a tensor's bytes. Raises FileError for values that float16 has no numbers for, and those that are not finite."""
    from gguf.quants import quantize

    if not bool(torch.isfinite(tensor).all()):
        raise FileError(f"{name} has values that are not finite.")
    if kind == "f16" and float(tensor.abs().max()) > _LARGEST_HALF:
        raise FileError(f"{name} has values beyond float16's: choose --type q8_0 or f32.")
    stored = package_of.package().GGMLQuantizationType[kind.upper()]
    data: np.ndarray[Any, Any] = quantize(tensor.contiguous().numpy(), stored)
    return data.view(_uint8())


def _add_settings(writer: Any, plan: _Plan) -> None:
    """Add the model's sizes."""
    config, package = plan.config, package_of.package()
    writer.add_type(package.GGUFType.MODEL)
    kind = {"q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "f16": "MOSTLY_F16", "f32": "ALL_F32"}[plan.kind]
    writer.add_file_type(package.LlamaFileType[kind])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(package.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _differing(path: Path, hashes: dict[str, str]) -> str | None:
    """Name a tensor that a file does not have as it was meant; None where it has all."""
    try:
        tensors = {tensor.name: tensor for tensor in package_of.package().GGUFReader(path).tensors}
        for name, expected in hashes.items():
            if name not in tensors or hashlib.sha256(tensors[name].data.tobytes()).hexdigest() != expected:
                return name
    except (OSError, ValueError, IndexError, KeyError) as error:
        return str(error)
    return None if tensors.keys() == hashes.keys() else "other tensors"
