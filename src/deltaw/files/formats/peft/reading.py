"""Read a LoRA adapter's folder, with everything in it checked."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import FileError, first_line, shown
from deltaw.files.formats.peft.adapter import LoRAFile, Pair
from deltaw.files.formats.peft.checks import disagreements, tensor_problems
from deltaw.files.formats.peft.config import (
    KNOWN,
    PICKLED,
    UNKNOWN,
    WEIGHTS,
    PeftConfig,
    method_of,
    read_config,
    setting_problems,
    unknown_settings,
)
from deltaw.files.formats.peft.keys import Sorted, layer_of, plain_name, sort, updated_layers
from deltaw.files.formats.peft.metadata import check_whole, is_ours, scales_of
from deltaw.files.formats.peft.ranks import rank_in, rank_of, scale_of
from deltaw.files.formats.peft.targets import (
    by_default_targets,
    is_meant,
    is_target,
    left_out,
    target_problems,
    tokens_of,
    told_by_name,
    with_tied,
)
from deltaw.files.formats.safetensors import DTYPES, read_tensors
from deltaw.layers.names import in_order

log = logging.getLogger("deltaw")

_LARGEST_SCALE = torch.finfo(torch.float32).max


def read(folder: Path, *, of_model: bool = False) -> LoRAFile:
    """Read and check a folder.

    Layers that the settings of a foreign file do not mean are left out, as PEFT leaves them out, which is logged.

    Args:
        folder: the adapter's.
        of_model: the reader has a model. Layers of which only a model tells it are then `unclear`, else a problem.

    Raises:
        FileError: with every problem: a missing or truncated file, a setting that would be misread, an unexpected key, an A
            without its B, ranks that differ, values not finite, settings that mean none of the file's layers.
    """
    if method := method_of(folder):
        raise FileError(f"{folder} holds a {method} adapter: what was asked for works on LoRA's A and B alone.")
    config = read_config(folder)
    problems = setting_problems(config.settings)
    if problems and config.peft_type != "LORA":
        raise FileError(f"The adapter in {folder} cannot be used:", problems)
    if unknown := unknown_settings(config.settings, KNOWN):
        log.warning(UNKNOWN, folder, ", ".join(unknown))
    tensors, metadata = tensors_of(folder)
    name = WEIGHTS if (folder / WEIGHTS).is_file() else PICKLED
    unclear: list[str] = []
    if not is_ours(metadata):
        problems += target_problems(config.settings)
        if not problems:
            tensors, unclear = _meant(tensors, config, folder / name)
            problems += [
                f"{layer}: only PEFT, on a model, can tell whether the settings mean it"
                for layer in unclear
                if not of_model and not told_by_name(layer, config)
            ]
    by_kind = sort(tensors, biases=config.biases_trained)
    _drop_tied_rows(by_kind, config)
    problems += [f"{name}: unexpected key {key!r}" for key in by_kind.unknown]
    problems += [f"{name}: {one!r} and {other!r} are the same tensor's names" for one, other in by_kind.twice]
    if by_kind.unused:
        log.warning(
            "%s of %s and the like are left out: PEFT computes with the update inside the attention's wrapper alone.",
            ", ".join(by_kind.unused[:2]), folder,
        )  # fmt: skip
    problems += [f"{name}: {problem}" for problem in tensor_problems(by_kind, tensors)]
    if not (by_kind.parts or by_kind.rows or by_kind.whole):
        problems.append(f"{name}: no A or B in it ({len(tensors)} tensors)")
    problems = problems or disagreements(by_kind, config, name)
    if problems:
        raise FileError(f"The adapter in {folder} cannot be used:", problems)
    adapter = _adapter(by_kind, config, metadata, unclear)
    if large := [f"{layer}: its scale is {x:g}" for layer, x in adapter.scales.items() if x > _LARGEST_SCALE]:
        raise FileError(f"The adapter in {folder} cannot be used: α is too large to compute with.", large)
    return adapter


def _adapter(by_kind: Sorted, config: PeftConfig, metadata: dict[str, str], unclear: list[str]) -> LoRAFile:
    """Return the adapter of tensors without problems."""
    return LoRAFile(
        factors={layer: (parts["A"], parts["B"]) for layer, parts in by_kind.parts.items()},
        scales=_scales(by_kind, config, metadata),
        config=config,
        metadata=metadata,
        embeddings=frozenset(by_kind.embeddings),
        kernels=by_kind.kernels,
        magnitudes=_part(by_kind, "magnitude"),
        biases=_part(by_kind, "bias"),
        rows={layer: _in_order(tokens_of(layer, config) or (), rows) for layer, rows in by_kind.rows.items()},
        whole=by_kind.whole,
        copies=by_kind.copies,
        originals=by_kind.originals,
        wrapped=by_kind.wrapped,
        unclear=frozenset(unclear),
    )


def tensors_of(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return an adapter's tensors by their keys, and the file's metadata. Raises FileError, also for a wrong checksum."""
    if (folder / WEIGHTS).is_file():
        read_in, metadata = read_tensors(folder / WEIGHTS)
        check_whole(read_in, metadata, folder / WEIGHTS)
        return read_in, metadata
    return named_tensors(unpickled(folder / PICKLED), folder / PICKLED), {}


def unpickled(path: Path) -> object:
    """Read a pickled file, in which tensors and plain containers alone are allowed. Raises FileError."""
    try:
        contents: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for damaged bytes, torch and what it uses raise dozens of types
        raise FileError(f"{path} cannot be read as weights alone: {first_line(error)}") from error
    return contents


def named_tensors(contents: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors of an unpickled file by their names.

    Raises FileError where it holds anything else, or tensors that are no plain values in memory: sparse and quantised ones, those
    without values (meta), and views of more entries than the file has.
    """
    if not isinstance(contents, Mapping) or not all(isinstance(tensor, Tensor) for tensor in contents.values()):
        raise FileError(f"{path} holds no tensors by their names.")
    problems = [f"the key {key!r:.200} is no text" for key in contents if not isinstance(key, str)]
    problems += [f"{key!s:.200} {why}" for key, tensor in contents.items() if (why := _unlike_plain(tensor))]
    if problems:
        raise FileError(f"{path} cannot be used:", problems)
    return {key: tensor.detach() for key, tensor in contents.items()}


def _unlike_plain(tensor: Tensor) -> str | None:
    """Say why a tensor is none that an adapter can have; None where it is one."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_nested:
        return f"has no plain values: it is {tensor.layout} on {tensor.device}"
    if tensor.dtype not in DTYPES.values():
        return f"is {tensor.dtype}, which no adapter has"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"is {list(tensor.shape)}, of which the file has fewer entries"
    return None


def _meant(tensors: Mapping[str, Tensor], config: PeftConfig, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors without those of layers that the settings do not mean, and the layers of which only a model tells.

    Raises FileError where the settings mean none.
    """
    answers, by_default = dict[str, bool | None](), []
    for layer, (A, dense) in updated_layers(tensors).items():
        stack = A.ndim == 2 and len(A) != rank_of(layer, config)
        answers[layer] = is_meant(layer, config, dense=dense, stack=stack)
        by_default += [layer] if by_default_targets(layer, config, stack=stack) else []
    answers = with_tied(answers, config)
    unmeant = left_out(answers, config, path)
    if by_default:
        log.warning(
            "The settings of %s name no target_modules: its %d layers are used. PEFT would take defaults for the type of model.",
            path.parent, len(by_default),
        )  # fmt: skip
    dropped = {key for key in tensors if layer_of(key) in unmeant}
    hidden = {} if by_default else {key: name for key in tensors if (name := _hidden(key, config, answers))}
    if hidden:
        log.warning(
            "Parameters in %s are left out, as PEFT leaves them out, which has updates of its own around their layers: %s.",
            path.parent, shown(in_order(hidden.values())),
        )  # fmt: skip
    kept = {key: tensor for key, tensor in tensors.items() if key not in dropped | hidden.keys()}
    return kept, [layer for layer, answer in answers.items() if answer is None]


def _hidden(key: str, config: PeftConfig, updated: Mapping[str, object]) -> str | None:
    """Return the parameter's name where PEFT wraps its layer, for which the file has no update: PEFT then finds no such key."""
    name = plain_name(key)
    layer = name.rpartition(".")[0] if name else ""
    return name if name and layer not in updated and is_target(layer, config) is True else None


def _scales(by_kind: Sorted, config: PeftConfig, metadata: Mapping[str, str]) -> dict[str, float]:
    """Return each layer's scale by the settings; or the metadata's, where that is the same to all but the last bits."""
    scales = {
        layer: scale_of(layer, rank_in(layer, parts["A"], config), config) for layer, parts in by_kind.parts.items()
    }
    exact = scales_of(metadata)
    return scales | {n: x for n, x in exact.items() if n in scales and math.isclose(x, scales[n], rel_tol=1e-14)}


def _drop_tied_rows(by_kind: Sorted, config: PeftConfig) -> None:
    """Leave out rows of tokens that the file has twice.

    PEFT writes those of a resized vocabulary for a tied head too, which the settings do not name. All layers that are tied
    follow the one that is named.
    """
    named = [rows for layer, rows in by_kind.rows.items() if tokens_of(layer, config) is not None]
    by_kind.rows = {
        layer: rows
        for layer, rows in by_kind.rows.items()
        if tokens_of(layer, config) is not None or not any(torch.equal(rows, other) for other in named)
    }


def _part(by_kind: Sorted, part: str) -> dict[str, Tensor]:
    """Return layer → this part of its update, of those that have it."""
    return {layer: parts[part] for layer, parts in by_kind.parts.items() if part in parts}


def _in_order(ids: tuple[int, ...], rows: Tensor) -> Pair:
    """Return the ids and their rows, sorted by ids."""
    indices, order = torch.tensor(ids).sort()
    return indices, rows[order]
