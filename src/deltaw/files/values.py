"""Values of an adapter's file that stand in place of the base's: whole parameters, and rows of tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.errors import nearest
from deltaw.files.formats.peft.adapter import LoRAFile
from deltaw.files.formats.peft.targets import saved_module, tokens_of
from deltaw.layers.kinds import as_matrix
from deltaw.layers.ops.merging import merge_, wide
from deltaw.layers.tree import dotted, owner_of
from deltaw.methods.updates.base import Update, own_tensor
from deltaw.methods.updates.lowrank import LowRank
from deltaw.methods.updates.whole import Replaced, ReplacedRows
from deltaw.model.record import readers

log = logging.getLogger("deltaw")

_Named = Mapping[str, tuple[nn.Parameter, list[str]]]
"""Name of a parameter → it, and all of its names."""


@dataclass(frozen=True)
class Fit:
    """A file, and the model that its updates are made for."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    """All of the model's modules by name."""
    file: LoRAFile
    device: torch.device | None
    """The device that updates are kept on; None: beside what they are updates of."""

    def place(self, tensor: Tensor) -> torch.device:
        """Return where to keep what stands beside this tensor of the base, or in its place."""
        return tensor.device if self.device is None else self.device


def put_values(fit: Fit, updates: dict[str, Update], problems: list[str]) -> None:
    """Put values in place of the base's among the updates.

    A value that stands in modules_to_save is its module's alone. With any other, all layers follow whose weights the model ties
    to it.
    """
    file = fit.file
    values = {name: value for name, value in file.whole.items() if name.removesuffix(".bias") not in updates}
    if not values and not file.copies and not file.originals:
        return
    named = {name: (parameter, names) for parameter, names in readers(fit.model).items() for name in names}
    values |= {
        name: value
        for name, value in file.copies.items()
        if name in named and not _only_rows_differ(file, name, value, named[name][0]) and _another(name, value, named)
    }
    values = _without_buffers(fit, _with_originals(file, values, named), problems)
    parameters: dict[str, nn.Parameter] = {}
    for name, value in values.items():
        if name not in named:
            problems.append(f"the model has no parameter {name!r}{nearest(name, named, count=1)}")
            continue
        before, names = named[name]
        if not value.is_floating_point():
            problems.append(f"{name} is {value.dtype}; it must be floating point")
            continue
        twin = next((parameters[n] for n in names if n in parameters and torch.equal(values[n], value)), None)
        parameters[name] = nn.Parameter(value.to(fit.place(before), before.dtype)) if twin is None else twin
    for name in list(parameters):
        if saved_module(name, file.config) is None:
            for other in named[name][1]:
                parameters.setdefault(other, parameters[name])
    _replace(fit, updates, parameters, problems)


def _only_rows_differ(file: LoRAFile, name: str, copy: Tensor, before: Tensor) -> bool:
    """Return whether a copy of an embedding is this base's but for the rows of tokens that the file has besides."""
    layer = name.removesuffix(".weight")
    if layer not in file.rows or copy.ndim != 2 or copy.shape[1] != before.shape[1]:
        return False
    ids = torch.arange(len(copy))
    kept = ids[~torch.isin(ids, file.rows[layer][0])]
    return bool((kept < len(before)).all()) and _same(copy[kept], before[kept.to(before.device)])


def _with_originals(file: LoRAFile, values: dict[str, Tensor], named: _Named) -> dict[str, Tensor]:
    """Return `values`, and the base's own parameters that PEFT's wrappers of modules keep, for the layers that read them.

    A wrapped module reads its trained copy, so that its original is read by layers alone that the model ties to it.
    """
    others: dict[str, Tensor] = {}
    for name, original in file.originals.items():
        if name not in named or _same(original, before := named[name][0]):
            continue
        wrapped = saved_module(name, file.config) is not None
        tied = [n for n in named[name][1] if n not in values and not saved_module(n, file.config)]
        if wrapped and tied:
            if tied[0] not in others and _another(tied[0], original, named):
                others |= dict.fromkeys(tied, original)
        elif name not in values or not _resized(original, before):
            log.warning(
                "The adapter's file keeps the %s of the base that it was trained on, which is another one than this model's. "
                "It is left out: PEFT does not compute with it either while the adapter is on.", name,
            )  # fmt: skip
    return others | values


def _without_buffers(fit: Fit, values: dict[str, Tensor], problems: list[str]) -> dict[str, Tensor]:
    """Return `values` without the base's buffers, which PEFT's copies of modules have too. Other buffers are problems."""
    buffers = {
        dotted(name, own_name): buffer
        for name, module in fit.layers.items()
        for own_name, buffer in module._buffers.items()
        if buffer is not None
    }
    problems += [
        f"{name} is a buffer, and not this model's: values that change without gradients are not read"
        for name, value in values.items()
        if name in buffers and not _same(value, buffers[name])
    ]
    return {name: value for name, value in values.items() if name not in buffers}


def _another(name: str, copy: Tensor, named: _Named) -> bool:
    """Return whether the file's copy of a weight of the base is another one than this base's, and log it."""
    before = named[name][0]
    if _same(copy, before):
        return False
    if not _resized(copy, before):
        log.warning("The adapter's file has another %s than this model: the file's is used.", name)
    return True


def _replace(fit: Fit, updates: dict[str, Update], values: Mapping[str, nn.Parameter], problems: list[str]) -> None:
    """Put these values on their layers; where a layer has a low-rank update too, its sum with that."""
    of_layer: dict[str, dict[str, nn.Parameter]] = {}
    for name, value in values.items():
        layer_name, own_name = name.rsplit(".", 1)
        of_layer.setdefault(layer_name, {})[own_name] = value
    for name, own_values in of_layer.items():
        update = updates.get(name)
        if isinstance(update, LowRank):
            updates[name] = _sum(fit.layers[name], update, own_values, problems)
        else:
            updates[name] = Replaced(own_values)


@torch.no_grad()
def _sum(layer: nn.Module, update: LowRank, values: dict[str, nn.Parameter], problems: list[str]) -> Update:
    """Return the layer's values with ΔW added to their weight, or to the layer's own."""
    before = own_tensor(layer, "weight")
    weight, changes = values.get("weight", before).to(wide(before.dtype)), update.changes(layer)
    W = as_matrix(layer, "weight", weight.clone())
    d, k = update.B.shape[0], update.A.shape[1]
    if W.shape != (d, k):
        problems.append(f"A and B are {d}×{k}, the weight {list(weight.shape)}")
        return update
    merge_(W, changes["weight"])
    values = values | {"weight": nn.Parameter(as_matrix(layer, "weight", W).to(before.dtype))}
    return Replaced(values if update.bias is None else values | {"bias": update.bias})


# --- rows of tokens ---------------------------------------------------------------------------------------------


def put_rows(fit: Fit, updates: dict[str, Update], problems: list[str]) -> None:
    """Put rows of some tokens among the updates, also of the layers that follow theirs."""
    for name, (indices, rows) in fit.file.rows.items():
        if name not in fit.layers:
            problems.append(f"the model has no layer {name!r}{nearest(name, fit.layers, count=1)}")
            continue
        weight = fit.layers[name]._parameters.get("weight")
        if weight is None:
            problems.append(f"{name!r} has no weight whose rows could be tokens'")
            continue
        shared, in_copy = nn.Parameter(rows.to(fit.place(weight))), dotted(name, "weight") in fit.file.copies
        for layer_name in (name, *_following(fit, name)):
            update = updates.get(layer_name)
            if in_copy and isinstance(update, Replaced):
                _put_in_copy(update.values()["weight"], indices, rows, problems)
                continue
            if update is not None:
                problems.append(f"{dotted(layer_name, 'weight')} has rows of tokens, and another update too")
            updates[layer_name] = ReplacedRows(indices.to(weight.device), shared)


def _following(fit: Fit, name: str) -> list[str]:
    """Return the layers that have this one's rows of tokens too, as PEFT has it.

    They are those that the model ties to its input embedding, unless the file has another list of tokens for one of them.
    """
    layer, file = fit.layers[name], fit.file
    tied = [n for n, m in fit.layers.items() if m._parameters.get("weight") is layer._parameters["weight"]]
    embedding = getattr(owner_of(fit.model), "get_input_embeddings", lambda: None)()
    alone = any(tokens_of(n, file.config) != tokens_of(name, file.config) for n in tied if n in file.rows)
    return [] if alone or layer is not embedding else [n for n in tied if n not in file.rows]


@torch.no_grad()
def _put_in_copy(copy: nn.Parameter, indices: Tensor, rows: Tensor, problems: list[str]) -> None:
    """Write rows of tokens into the file's copy of a base's embedding, which stands in place of this base's."""
    if rows.ndim != 2 or rows.shape[1] != copy.shape[1] or int(indices[-1]) >= len(copy):
        problems.append(f"its rows of tokens are {list(rows.shape)}, the file's embedding {list(copy.shape)}")
    else:
        copy[indices.to(copy.device)] = rows.to(copy)


def _resized(copy: Tensor, before: Tensor) -> bool:
    """Return whether a file's copy of a weight is this one but for its last rows: those of tokens that were added."""
    if copy.ndim != 2 or copy.shape[1:] != before.shape[1:]:
        return False
    both = min(len(copy), len(before))
    alike = (copy[:both].to(before.device, before.dtype) == before[:both]).all(1)
    count = int(alike.sum())
    return count > 0 and bool(alike[:count].all())


def _same(copy: Tensor, before: Tensor) -> bool:
    """Return whether a file's copy of a parameter has the parameter's values, in its dtype."""
    return copy.shape == before.shape and torch.equal(copy.to(before.device, before.dtype), before)
