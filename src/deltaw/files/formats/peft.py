"""Adapter folders as PEFT, vLLM and the HF hub read them: adapter_config.json + adapter_model.safetensors. No model code.

A file's tensors are `base_model.model.<layer>.lora_A.weight` [r, k] and `.lora_B.weight` [d, r] (peft_keys.py has the others);
the config gives α, by pattern where it varies (peft_config.py). What is ours goes into the safetensors metadata: format version,
fingerprint, training config.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor

from deltaw.errors import BaseMismatch, FileError, first_line
from deltaw.files.formats.atomic import replacing_folder
from deltaw.files.formats.fingerprint import Fingerprint, Outdated
from deltaw.files.formats.peft_config import (
    CONFIG,
    KNOWN,
    PICKLED,
    WEIGHTS,
    method_of,
    pattern_names,
    pattern_problem,
    rank_in,
    rank_of,
    read_config,
    saved_module,
    scale_of,
    setting_problems,
    tokens_of,
    unknown_settings,
)
from deltaw.files.formats.peft_keys import PREFIX, Sorted, layer_of, plain_name, sort, unstacked, updated_layers
from deltaw.files.formats.peft_targets import (
    CHOOSING,
    by_default_targets,
    is_meant,
    is_target,
    target_problems,
    told_by_name,
    with_tied,
)
from deltaw.files.formats.safetensors import read_tensors
from deltaw.layers.kinds import Runs
from deltaw.layers.names import in_order, shown
from deltaw.layers.ops.merging import Change, Product, Rescaled

log = logging.getLogger("deltaw")

FORMAT = "1"
# Metadata: fingerprints of the whole base, and of the weights that the adapter's layers have
BASE, W0 = "deltaw_base", "deltaw_w0"
# Metadata: JSON list of the layers whose weights are stored [k, d]
TRANSPOSED = "deltaw_transposed"
# Metadata: JSON, layer → its slices that have updates of their own → their rows of its output
SLICES = "deltaw_slices"
# Metadata: JSON list of the tokens that end what the adapter was taught to say
ENDS = "deltaw_ends"

# Metadata: JSON, layer → its scale, where no α in the config gives that to the last bit
SCALES = "deltaw_scales"

_UNUSED = "and the like are left out: PEFT computes with the update inside the attention's wrapper alone."

# PEFT (0.21) adds the ΔW of the output projection inside a wrapped nn.MultiheadAttention twice in each pass: what a file has for
# it is half of what it means
TWICE = 2.0

_NO_BASE = "%s has no fingerprint of its base (it was not written by deltaw): only its keys and shapes are checked."
_OUTDATED = (
    "%s names its base as an older version of deltaw did, by a sample of its entries, which tells too few bases apart: only its "
    "keys and shapes are checked. Save the adapter again to renew it."
)

_LEFT_OUT = "%d of the %d layers in %s are left out, as PEFT leaves them out: its settings (%s) do not mean %s."
_DEFAULTS = (
    "The settings of %s name no target_modules: its %d layers are used. PEFT would take defaults for the type of model."
)
_HIDDEN = (
    "Parameters in %s are left out, as PEFT leaves them out, which has updates of its own around their layers: %s."
)
UNKNOWN = "The settings of %s have %s, which this version of deltaw does not know: what they change is left out."
_UNTOLD = "%s: only PEFT, on a model, can tell whether the settings mean it"

_Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LoRAFile:
    """A low-rank adapter as it is on disk, its tensors on the CPU."""

    factors: dict[str, _Pair]
    """Layer name → A [r, k], B [d, r]; of a stack of E matrices A [E·r, k], B [d, r·E] (see peft_keys.py)."""
    scales: dict[str, float]
    """Layer name → the factor of BA."""
    config: dict[str, Any]
    """adapter_config.json."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Ours, from the safetensors header: deltaw_format, deltaw_base, deltaw_training … Empty for foreign files."""
    embeddings: frozenset[str] = frozenset()
    """The layers of `factors` that are embeddings: k tokens, d dimensions."""
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The layers of `factors` that are convolutions → one of their kernels, [c/groups, …], k numbers."""
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    """Layer name → DoRA's m [d]."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Layer name → b [d], of which scale·b is added to the layer's own bias."""
    rows: dict[str, _Pair] = field(default_factory=dict)
    """Layer name → token ids [n], and the rows [n, e] that stand for the base's."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter of the base → the value in its place."""
    copies: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter of a layer in `factors` → the base's own value, where the file has that too."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter of a module that PEFT copied to train it → the base's own value, where the file has that too."""

    wrapped: str | None = None
    """The first of the file's keys with what torch.compile, DDP and their like put into names, which these are without."""
    unclear: frozenset[str] = frozenset()
    """The layers of `factors` of which only a model tells whether PEFT computes with them."""

    def rank(self, layer: str) -> int:
        """r; of a stack that of each of its matrices."""
        return rank_in(layer, self.factors[layer][0], self.config)

    def matrices(self, layer: str) -> _Pair:
        """A [r, k] and B [d, r]; of a stack of E matrices A [E, r, k] and B [E, d, r]."""
        (A, B), rank = self.factors[layer], self.rank(layer)
        return (A, B) if rank == len(A) else unstacked(A, B, rank)

    def shown(self, layer: str) -> str:
        """The layer's name for people: the parameter's that a stack is, where the file says which one."""
        names = names_in_peft(layer, self)
        return names[0] if len(names) == 1 and self.rank(layer) != len(self.factors[layer][0]) else layer

    @property
    def changes_anything(self) -> bool:
        """Whether it is more than low-rank updates whose B is zero, which an adapter has before the first step of a training."""
        others = self.magnitudes or self.biases or self.rows or self.whole
        # float8 has no test of its own for zero
        return bool(others) or any(bool(B.float().any()) for _, B in self.factors.values())

    def product(self, layer: str) -> Product:
        """ΔW of a layer's low-rank update, but for DoRA's magnitude."""
        return Product(*self.factors[layer], self.scales[layer])

    def change(self, layer: str) -> Change:
        """What merging makes of a layer's weight."""
        product = self.product(layer)
        return Rescaled(product, self.magnitudes[layer]) if layer in self.magnitudes else product

    def replaced(self) -> set[str]:
        """Names of the base's parameters that the adapter has values for, whole or some rows of them."""
        return {*self.whole, *(f"{layer}.weight" for layer in self.rows)}

    def beyond(self) -> list[str]:
        """What the adapter has besides A and B of dense layers, a name each."""
        named = *self.magnitudes, *self.biases, *self.embeddings, *self.rows, *self.whole, *self.copies
        return list(dict.fromkeys(named))


def read(folder: Path, *, of_model: bool = False) -> LoRAFile:
    """Read and check a folder. Layers that the settings of a foreign file do not mean are left out, as PEFT leaves them out, with
    a warning. Those of which only a model tells it are in `unclear` where the reader has one (`of_model`), else refused.

    Raises FileError with every problem: a missing or truncated file, a setting that this reader would misread, a key that it does
    not know, an A without its B, ranks that differ, values not finite, settings that mean none of the file's layers."""
    if method := method_of(folder):
        raise FileError(f"{folder} holds a {method} adapter: what was asked for works on LoRA's A and B alone.")
    config = read_config(folder)
    problems = setting_problems(config)
    if problems and config.get("peft_type") != "LORA":
        raise FileError(f"The adapter in {folder} cannot be used:", problems)
    if unknown := unknown_settings(config, KNOWN):
        log.warning(UNKNOWN, folder, ", ".join(unknown))
    tensors, metadata = tensors_of(folder)
    name = WEIGHTS if (folder / WEIGHTS).is_file() else PICKLED
    unclear: list[str] = []
    if not is_ours(metadata):
        problems += target_problems(config)
        if not problems:
            tensors, unclear = _meant(tensors, config, folder / name)
            problems += [] if of_model else [_UNTOLD % layer for layer in unclear if not told_by_name(layer, config)]
    found = sort(tensors, biases=config.get("bias") in ("all", "lora_only"))
    _drop_tied_rows(found, config)
    problems += [f"{name}: unexpected key {key!r}" for key in found.unknown]
    problems += [f"{name}: {one!r} and {other!r} are the same tensor's names" for one, other in found.twice]
    if found.unused:
        log.warning("%s of %s %s", ", ".join(found.unused[:2]), folder, _UNUSED)
    problems += [f"{name}: {problem}" for problem in _tensor_problems(found, tensors)]
    if not (found.parts or found.rows or found.whole):
        problems.append(f"{name}: no A or B in it ({len(tensors)} tensors)")
    if not problems:
        problems = _disagreements(found, config, name)
    if problems:
        raise FileError(f"The adapter in {folder} cannot be used:", problems)
    return LoRAFile(
        factors={layer: (parts["A"], parts["B"]) for layer, parts in found.parts.items()},
        scales=_scales(found, config, metadata),
        config=config,
        metadata=metadata,
        embeddings=frozenset(found.embeddings),
        kernels=found.kernels,
        magnitudes=_part(found, "magnitude"),
        biases=_part(found, "bias"),
        rows={layer: _in_order(tokens_of(layer, config), rows) for layer, rows in found.rows.items()},
        whole=found.whole,
        copies=found.copies,
        originals=found.originals,
        wrapped=found.wrapped,
        unclear=frozenset(unclear),
    )


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether deltaw wrote a file with this metadata."""
    return any(key.startswith("deltaw_") for key in metadata)


def _meant(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A foreign file's tensors without those of layers that its settings do not mean, and the layers of which only a model tells
    it. Raises FileError where they mean none."""
    answers, by_default = dict[str, bool | None](), []
    for layer, (A, dense) in updated_layers(tensors).items():
        stack = A.ndim == 2 and len(A) != rank_of(layer, config)
        answers[layer] = is_meant(layer, config, dense=dense, stack=stack)
        by_default += [layer] if by_default_targets(layer, config, stack=stack) else []
    answers = with_tied(answers, config)
    left_out = said_left_out(answers, config, path)
    if by_default:
        log.warning(_DEFAULTS, path.parent, len(by_default))
    gone = {key for key in tensors if layer_of(key) in left_out}
    hidden = {
        key: name for key in tensors if (name := plain_name(key)) and is_target(name.rpartition(".")[0], config) is True
    }
    hidden = (
        {key: name for key, name in hidden.items() if name.rpartition(".")[0] not in answers} if not by_default else {}
    )
    if hidden:
        log.warning(_HIDDEN, path.parent, shown(in_order(hidden.values())))
    kept = {key: tensor for key, tensor in tensors.items() if key not in gone | hidden.keys()}
    return kept, [layer for layer, answer in answers.items() if answer is None]


def _scales(found: Sorted, config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, float]:
    """Each layer's scale by the config; or the one of our metadata, where it is that to all but the last bits."""
    scales = {
        layer: scale_of(layer, rank_in(layer, parts["A"], config), config) for layer, parts in found.parts.items()
    }
    try:
        exact = json.loads(metadata.get(SCALES, "{}"))
        return scales | {n: x for n, x in exact.items() if n in scales and math.isclose(x, scales[n], rel_tol=1e-14)}
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(f"The scales of layers in the metadata of {WEIGHTS} are damaged: {error}") from error


def said_left_out(answers: Mapping[str, bool | None], config: Mapping[str, Any], path: Path) -> list[str]:
    """The layers that `is_meant` answers no for, of which is warned. Raises FileError where it does so for all."""
    left_out = in_order(layer for layer, answer in answers.items() if answer is False)
    settings = ", ".join(key for key in CHOOSING if config.get(key) is not None)
    if left_out and len(left_out) == len(answers):
        raise FileError(
            f"The adapter in {path.parent} cannot be used: its settings ({settings}) mean none of the {len(answers)} layers in "
            f"{path.name}, {shown(left_out)}."
        )
    if left_out:
        log.warning(_LEFT_OUT, len(left_out), len(answers), path.parent, settings, shown(left_out))
    return left_out


def _metadata(adapter: LoRAFile) -> dict[str, str]:
    """What the safetensors header says, with the scales that no α of the config gives to the last bit."""
    exact = {
        layer: scale
        for layer, scale in adapter.scales.items()
        if scale_of(layer, adapter.rank(layer), adapter.config) != scale
    }
    others = {key: value for key, value in adapter.metadata.items() if key != SCALES}
    return {"format": "pt", **others, **({SCALES: json.dumps(exact, sort_keys=True)} if exact else {})}


def _drop_tied_rows(found: Sorted, config: Mapping[str, Any]) -> None:
    """Leave out rows of tokens that the file has twice: PEFT writes those of a resized vocabulary for a tied head too, which the
    settings do not name. All layers that are tied follow the one that is named."""
    named = [rows for layer, rows in found.rows.items() if tokens_of(layer, config) is not None]
    found.rows = {
        layer: rows
        for layer, rows in found.rows.items()
        if tokens_of(layer, config) is not None or not any(torch.equal(rows, other) for other in named)
    }


def _part(found: Sorted, part: str) -> dict[str, Tensor]:
    return {layer: parts[part] for layer, parts in found.parts.items() if part in parts}


def _in_order(ids: list[int] | None, rows: Tensor) -> _Pair:
    assert ids is not None
    indices, order = torch.tensor(ids).sort()
    return indices, rows[order]


def write(folder: Path, adapter: LoRAFile, beside: Callable[[Path], None] = lambda folder: None) -> Path:
    """Write the folder atomically, then read it back and compare; `beside` adds other files to it. Raises FileError when what
    was read differs."""
    tensors = _stored(adapter)
    bad = [key for key, tensor in tensors.items() if not _all(tensor)]
    if bad:
        raise FileError("Not saved: values are not finite (NaN or infinity) in", bad)
    with replacing_folder(folder) as temporary:
        (temporary / CONFIG).write_text(_config_text(adapter), encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, metadata=_metadata(adapter))
        back = read(temporary)
        again = _keys(back)
        same = again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
        if not same or back.scales != adapter.scales or not _same_tokens(back, adapter):
            raise FileError(f"Not saved: what was written to {folder} did not read back the same.")
        beside(temporary)
    return folder


def size(adapter: LoRAFile) -> int:
    """Bytes of the folder's two files, if it were written."""
    return len(save_bytes(_stored(adapter), metadata=_metadata(adapter))) + len(_config_text(adapter).encode())


def _stored(adapter: LoRAFile) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in _keys(adapter).items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses memory that two names share, as layers do that follow one value
        found[key] = value.clone() if value.data_ptr() in places else value
        places.add(value.data_ptr())
    return found


def _config_text(adapter: LoRAFile) -> str:
    return json.dumps(adapter.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _same_tokens(one: LoRAFile, other: LoRAFile) -> bool:
    return one.rows.keys() == other.rows.keys() and all(
        torch.equal(one.rows[layer][0], other.rows[layer][0].cpu()) for layer in one.rows
    )


def _keys(adapter: LoRAFile) -> dict[str, Tensor]:
    """The file's tensors by their keys."""
    found: dict[str, Tensor] = {}
    for layer, (A, B) in adapter.factors.items():
        embedding, kernel = layer in adapter.embeddings, adapter.kernels.get(layer)
        if kernel is not None:
            A, B = A.view(-1, *kernel), B.view(*B.shape, *[1] * (len(kernel) - 1))
        found[f"{layer}.lora_embedding_A" if embedding else f"{layer}.lora_A.weight"] = A
        found[f"{layer}.lora_embedding_B" if embedding else f"{layer}.lora_B.weight"] = B
    for layer, m in adapter.magnitudes.items():
        ones = [1] * (len(adapter.kernels[layer]) - 1) if layer in adapter.kernels else None
        found[f"{layer}.lora_magnitude_vector"] = m if ones is None else m.view(1, -1, *ones)
    found |= {f"{layer}.lora_B.bias": b for layer, b in adapter.biases.items()}
    for layer, (indices, rows) in adapter.rows.items():
        order = torch.searchsorted(indices.cpu(), torch.tensor(tokens_of(layer, adapter.config)))
        found[f"{layer}.token_adapter.trainable_tokens_delta"] = rows[order.to(rows.device)]
    inner = {layer.replace(".base_layer.", "."): layer for layer in adapter.factors if ".base_layer." in layer}
    for name, value in {**adapter.whole, **adapter.copies}.items():
        layer, own_name = name.rsplit(".", 1)
        layer = inner.get(layer, layer)
        inside = "token_adapter.base_layer." if layer in adapter.rows and name in adapter.copies else ""
        inside = "base_layer." if layer in adapter.factors else inside
        found[f"{layer}.{inside}{own_name}"] = value
    for name, value in adapter.originals.items():
        module = saved_module(name, adapter.config) or name.rpartition(".")[0]
        found[f"{module}.original_module{name.removeprefix(module)}"] = value
    return {f"{PREFIX}{key}": tensor for key, tensor in found.items()}


def tensors_of(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """By their keys, and our metadata."""
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    path = folder / PICKLED
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise FileError(f"{path} cannot be read as weights alone: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise FileError(f"{path} holds no tensors by their names.")
    return tensors, {}


# --- what can be wrong ------------------------------------------------------------------------------------------


def _tensor_problems(found: Sorted, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the tensors by themselves."""
    finite = _finite(tensors.values())
    problems = [problem for layer, parts in found.parts.items() for problem in _part_problems(layer, parts, finite)]
    values = *found.whole.items(), *found.rows.items(), *found.copies.items(), *found.originals.items()
    for name, value in values:
        # a copied module's counters are whole numbers; whether they are its buffers is known on a model
        problems += _value_problems(name, value, finite) if value.is_floating_point() or name in found.rows else []
    problems += [
        f"{layer}: its rows of tokens are {list(r.shape)}; they must be [n, e]"
        for layer, r in found.rows.items()
        if r.ndim != 2
    ]
    return problems


def _part_problems(layer: str, parts: Mapping[str, Tensor], finite: bool) -> list[str]:
    missing = [part for part in "AB" if part not in parts]
    if missing:
        return [f"{layer}: {missing[0]} is missing"]
    A, B = parts["A"], parts["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.numel() or not B.numel():
        return [f"{layer}: A is {tuple(A.shape)} and B {tuple(B.shape)}; they must be [r, k] and [d, r]"]
    if not A.is_floating_point() or not B.is_floating_point():
        return [f"{layer}: A is {A.dtype} and B {B.dtype}; they must be floating point"]
    problems = [] if finite else [f"{layer}: {n} has values that are not finite" for n in "AB" if not _all(parts[n])]
    for part in parts.keys() - {"A", "B"}:
        if parts[part].shape != (B.shape[0],):
            problems.append(f"{layer}: its {part} is {list(parts[part].shape)}; it must be [{B.shape[0]}]")
        problems += _value_problems(f"{layer}: its {part}", parts[part], finite)
    return problems


def _value_problems(name: str, value: Tensor, finite: bool) -> list[str]:
    if not value.is_floating_point():
        return [f"{name} is {value.dtype}; it must be floating point"]
    return [] if finite or _all(value) else [f"{name} has values that are not finite"]


def _finite(tensors: Collection[Tensor]) -> bool:
    """Whether all entries surely are: a sum is finite only if its terms are. (One that overflows tells nothing.)"""
    floats = [t for t in tensors if t.is_floating_point()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in floats}
    if len(storages) == len({t.dtype for t in tensors}) == 1:  # a whole file's: one sum
        floats = [torch.empty(0, dtype=floats[0].dtype).set_(*storages.values())]
    sums = [t.sum(dtype=torch.float32) for t in floats]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def _all(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # PyTorch does not ask numbers of 8 bits
    return bool(torch.isfinite(wide).all())


def _disagreements(found: Sorted, config: Mapping[str, Any], name: str) -> list[str]:
    """Where the tensors are others than the settings say."""
    problems = []
    for layer, parts in found.parts.items():
        if unclear := pattern_problem(layer, config):
            problems.append(f"{layer}: {unclear}")
            continue
        rank, expected = rank_in(layer, parts["A"], config), rank_of(layer, config)
        if rank != expected:
            problems.append(f"{layer}: rank {rank} in {name}, {expected} in {CONFIG}")
        if ("magnitude" in parts) != bool(config.get("use_dora")):
            has = "a" if "magnitude" in parts else "no"
            problems.append(f"{layer}: {has} magnitude in {name}, use_dora is {config.get('use_dora')!r} in {CONFIG}")
    for layer, rows in found.rows.items():
        ids = tokens_of(layer, config)
        if ids is None or len(ids) != len(rows):
            problems.append(f"{layer}: rows of {len(rows)} tokens in {name}, of {len(ids or [])} in {CONFIG}")
    modules = config.get("modules_to_save") or []
    if modules and not any(saved_module(parameter, config) for parameter in found.whole):
        problems.append(f"{CONFIG}: modules_to_save is {modules!r}, but {name} has none of them")
    return problems


# --- the base ---------------------------------------------------------------------------------------------------


class _Named(Protocol):
    """What of a file says which base it is for."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...


def check_base(file: _Named, folder: Path, key: str, own: Callable[[str], str | None]) -> str:
    """Whether the adapter was made for these weights, by the fingerprint under `key` (BASE or W0) of its metadata. `own` gives
    each hash of the weights by its form, or None where they cannot be read. Returns "same", "cast" (in another precision), or
    "unknown", of which is warned. Raises BaseMismatch, and FileError for a damaged fingerprint."""
    expected = fingerprint_of(file, folder, key)
    if expected is None:
        log.warning(_NO_BASE if key not in file.metadata else _OUTDATED, folder)
        return "unknown"
    verdict = expected.compare_by(own)
    if verdict == "unknown":
        log.warning("Some weights of the base are not in memory: whether %s belongs to it is not checked.", folder)
    if verdict == "different":
        trained_on = file.config.get("base_model_name_or_path") or "another model"
        raise BaseMismatch(
            f"The adapter in {folder} was trained on other base weights ({trained_on}) than these are.\n"
            f"Give that base, or pass check_base=False (command line: --any-base) if you know that it fits."
        )
    if verdict == "cast":
        log.debug("%s was trained on this base in another precision.", folder)
    return verdict


def names_in_peft(layer: str, file: LoRAFile) -> list[str]:
    """The name that PEFT's patterns know a layer of the file by; several where the file does not say which one it is. Files of
    ours do: they have a module's parameters in its own order, of which PEFT wraps the last one outermost."""
    names = pattern_names(layer, file.config)
    return [names[-1 - layer.count(".base_layer")]] if len(names) > 1 and is_ours(file.metadata) else names


def by_inputs(file: LoRAFile) -> bool:
    """Whether PEFT wrote the file before 0.19, which took every stack's matrices for [k, d]."""
    if is_ours(file.metadata):
        return False
    numbers = re.match(r"(\d+)\.(\d+)", str(file.config.get("peft_version") or "0.17"))
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 19)


def transposed_layers(file: LoRAFile) -> set[str] | None:
    """The layers whose weights are stored [k, d], by our own metadata; None in foreign files."""
    if not is_ours(file.metadata):
        return None
    try:
        return set(json.loads(file.metadata.get(TRANSPOSED, "[]")))
    except (ValueError, TypeError) as error:
        raise FileError(f"The list of transposed layers in the metadata of {WEIGHTS} is damaged: {error}") from error


def slices_of(file: LoRAFile) -> dict[str, dict[str, Runs]]:
    """Layer → name of a slice → its rows, of layers whose A and B are those of some slices. Raises FileError for damaged ones."""
    try:
        found = json.loads(file.metadata.get(SLICES, "{}"))
        slices = {
            layer: {name: tuple((int(a), int(b)) for a, b in runs) for name, runs in own.items()}
            for layer, own in found.items()
        }
        for own in slices.values():
            if not own or any(not 0 <= a < b for runs in own.values() for a, b in runs or [(0, 0)]):
                raise ValueError(f"{own} are no rows")
        return slices
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(f"The slices of layers in the metadata of {WEIGHTS} are damaged: {error}") from error


def ends_of(file: _Named, folder: Path) -> tuple[int, ...]:
    """The ids of the tokens that end what the adapter was taught to say; none in foreign files. Raises FileError for damaged
    ones."""
    try:
        found = json.loads(file.metadata.get(ENDS, "[]"))
        if not isinstance(found, list) or not all(type(end) is int and end >= 0 for end in found):
            raise ValueError(f"{found!r} is no list of token ids")
    except ValueError as error:
        raise FileError(f"{folder}: the end tokens in the metadata of {WEIGHTS} are damaged: {error}") from error
    return tuple(found)


def fingerprint_of(file: _Named, folder: Path, key: str) -> Fingerprint | None:
    """The one under `key` of its metadata; None where there is none, or one of the first version. Raises FileError for a damaged
    one."""
    text = file.metadata.get(key)
    try:
        return None if text is None else Fingerprint.parse(text)
    except Outdated:
        return None
    except ValueError as error:
        raise FileError(f"{folder}: the base fingerprint {text!r} in its metadata is damaged.") from error
