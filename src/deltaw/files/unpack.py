"""A LoRA adapter's file as updates of one model, where it fits. Reads the model, changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.errors import FileError, nearest, shown
from deltaw.files.formats.peft.adapter import TWICE, LoRAFile
from deltaw.files.formats.peft.keys import transposed_in_file, unstacked
from deltaw.files.formats.peft.metadata import slices_of
from deltaw.files.formats.peft.ranks import rank_of
from deltaw.files.renames import unlike_in_peft, without_effect_in_peft
from deltaw.files.values import Fit, put_rows, put_values
from deltaw.layers.kinds import PARAMETER, ConvKind, EmbeddingKind, Runs, Weight, kind_of, matrices_of, why_not
from deltaw.layers.kinds import weights_of as weights_without_layer
from deltaw.layers.ops.merging import times
from deltaw.layers.tree import base_modules, dotted
from deltaw.methods.updates.base import Update, own_tensor
from deltaw.methods.updates.dora import LowRankRescaled
from deltaw.methods.updates.lowrank import LowRank, Sliced, sliced_rows
from deltaw.methods.updates.weights import Stack, put_on_weight

log = logging.getLogger("deltaw")


def fitted(
    model: nn.Module, layers: Mapping[str, nn.Module], file: LoRAFile, path: Path, *, device: torch.device | None = None
) -> dict[str, Update]:
    """Return the file's updates for the model's `layers`, in their order.

    A and B stay in the file's dtype, what is trained whole gets the base's.

    Args:
        model: the base.
        layers: all of its modules by name.
        file: the adapter, by the model's names.
        path: its folder, for messages.
        device: where the updates are kept (default: the layers').

    Raises:
        FileError: with everything that does not fit.
    """
    fit, problems = Fit(model, layers, file, device), list[str]()
    updates, unread = _low_rank(fit, problems)
    put_values(fit, updates, problems)
    put_rows(fit, updates, problems)
    if not problems and not updates:
        problems += [
            f"{name!r}: PEFT does not compute with its update, for the module around it only reads its weight"
            for name in unread
        ]
    problems += [f"{name!r}: {why}" for name, u in updates.items() if (why := u.other_shape(layers[name]))]
    if problems:
        raise FileError(f"The adapter in {path} does not fit this model; nothing was changed:", problems)
    return {name: updates[name] for name in layers if name in updates}


def vocabulary(model: nn.Module, file: LoRAFile) -> int:
    """Return how many tokens the model must have for the adapter's values of its embedding and head.

    These are more or fewer than it has where the vocabulary was resized before training.
    """
    getters = (getattr(model, f"get_{side}_embeddings", lambda: None) for side in ("input", "output"))
    ends = [end for get in getters if isinstance(end := get(), nn.Module)]
    names = [name for name, module in base_modules(model) if any(module is end for end in ends)]
    values = {**file.originals, **file.copies, **file.whole}
    whole = [value.shape[0] for name, value in values.items() if name.removesuffix(".weight") in names]
    rows = [int(indices[-1]) + 1 for name, (indices, _) in file.rows.items() if name in names]
    present = [len(weight) for end in ends[:1] if isinstance(weight := getattr(end, "weight", None), Tensor)]
    return max([*(whole or present), *rows], default=0)


# --- low-rank updates -------------------------------------------------------------------------------------------


def _low_rank(fit: Fit, problems: list[str]) -> tuple[dict[str, Update], list[str]]:
    """Return the updates of A and B by their layers, and the names of those that PEFT does not compute with."""
    updates, unread = dict[str, Update](), list[str]()
    slices = slices_of(fit.file.metadata)
    for name in fit.file.factors:
        layer_name, weight = _meant_by(name, fit)
        layer = fit.layers.get(layer_name)
        if layer is None:
            problems.append(f"the model has no layer {layer_name!r}{nearest(layer_name, fit.layers, count=1)}")
            continue
        if not fit.file.ours and without_effect_in_peft(name, fit.layers):
            unread.append(name)
            continue
        try:
            if weight is not None:
                place = dotted(layer_name, weight)
                part = _on_weight(fit, name, place, Weight(layer, weight), slices.get(name))
                first = put_on_weight(updates, layer_name, weight, part)
            else:
                place = layer_name
                update = _on_layer(fit, name, place, layer, slices.get(name))
                first = updates.setdefault(place, update) is update
        except FileError as error:
            problems += error.problems
            continue
        if not first:
            problems.append(f"{place!r} has a second update in the file, by the name {name!r}")
    if unread:
        log.warning(
            "Left out of the adapter: PEFT does not compute with its updates of %s, which the modules around them only read.",
            shown(unread),
        )
    return updates, unread


def _meant_by(name: str, fit: Fit) -> tuple[str, str | None]:
    """Return the layer that a name in the file means; or the module, and its name of the weight without a layer.

    PEFT wraps a module once for each of its weights, the last outermost.
    """
    if name in fit.layers and not matrices_of(fit.layers[name]):
        return name, None
    plain = name.replace(".base_layer", "")
    module = fit.layers.get(plain)
    if module is None:
        outer, _, last = plain.rpartition(".")
        known = outer in fit.layers and last in weights_without_layer(fit.layers[outer])
        return (outer, last) if known else (name, None)
    if isinstance(module, nn.MultiheadAttention):
        return plain, "in_proj_weight"
    matrices, targets = matrices_of(module), fit.file.config.target_parameters
    wanted = [m for m in matrices if any(f".{plain}.{m}".endswith(f".{target}") for target in targets)]
    wanted = wanted or [m for m in matrices if m == "weight"]  # of a router that was a dense layer in transformers 4
    depth = name.count(".base_layer")
    return plain, wanted[-1 - depth] if depth < len(wanted) else None


def _on_layer(fit: Fit, name: str, layer_name: str, layer: nn.Module, slices: Mapping[str, Runs] | None) -> LowRank:
    """Return the update of a layer by A and B, and by what DoRA and biases have beside them. Raises FileError."""
    file, kind = fit.file, kind_of(layer)
    why = why_not(layer) if kind is None else _of_another_kind(fit, name, layer)
    if kind is None or why:
        raise FileError(f"{layer_name!r}: {why}")
    device, scale, dropout = fit.place(own_tensor(layer, "weight")), file.scales[name], file.config.lora_dropout
    A, B = (factor.to(device) for factor in file.factors[name])
    bias = _bias(fit, name, layer_name, layer)
    if layer_name != name:
        B = times(B, TWICE)
    rows = sliced_rows(B, slices) if slices else None
    if slices and rows is not None:
        return Sliced(kind, A, rows, scale, slices, B.shape[0], dropout, bias)
    if name in file.magnitudes:
        return LowRankRescaled(kind, A, B, scale, file.magnitudes[name].to(device), dropout, bias)
    return LowRank(kind, A, B, scale, dropout, bias)


def _of_another_kind(fit: Fit, name: str, layer: nn.Module) -> str | None:
    """Say where the file's A and B are those of another kind of layer."""
    kind, file = kind_of(layer), fit.file
    kernel, in_file = tuple(own_tensor(layer, "weight").shape[1:]), file.kernels.get(name)
    this, a_convolution = f"it is a {type(layer).__name__}", isinstance(kind, ConvKind)
    if isinstance(kind, EmbeddingKind) != (name in file.embeddings):
        return f"{this}, the file's A and B are {'an embedding' if name in file.embeddings else 'a dense layer'}'s"
    if a_convolution != (in_file is not None):
        return f"{this}, the file's A and B are {'a dense layer' if in_file is None else 'a convolution'}'s"
    if in_file is not None and in_file != kernel:
        return f"{this} with kernels {list(kernel)}, the file's are {list(in_file)}"
    if not file.ours and (why := unlike_in_peft(layer)):
        return f"{this} {why}: no ΔW does what it computes"
    return None


def _bias(fit: Fit, name: str, layer_name: str, layer: nn.Module) -> Tensor | None:
    """Return the bias [d] that the layer has with the adapter, where that is another one."""
    file, bias = fit.file, fit.file.whole.get(f"{layer_name}.bias")
    if bias is None and name in file.biases:
        of_layer, added = layer._parameters.get("bias"), file.biases[name] * file.scales[name]
        bias = added if of_layer is None else of_layer.detach().to(added) + added
    return None if bias is None else bias.to(fit.place(own_tensor(layer, "weight")))


def _on_weight(fit: Fit, name: str, place: str, weight: Weight, slices: Mapping[str, Runs] | None) -> LowRank:
    """Return the update of a weight that has no layer, of the name `place` in the model. Raises FileError."""
    file, W0 = fit.file, weight.module._parameters.get(weight.name)
    if W0 is None:
        raise FileError(f"{place.rpartition('.')[0]!r} has no {weight.name}")
    in_patterns = file.names_in_peft(name)
    if len(in_patterns) == 1 and in_patterns[0] not in (name, place):
        raise FileError(f"{name!r}: by the file's settings it is {in_patterns[0]}, by this model's order {weight.name}")
    A, B = (factor.to(fit.place(W0)) for factor in file.factors[name])
    if W0.ndim == 3:
        return _of_stack(file, name, place, weight, A, B)
    rows = sliced_rows(B, slices) if slices else None
    if slices and rows is not None:
        return Sliced(PARAMETER, A, rows, file.scales[name], slices, B.shape[0])
    return LowRank(PARAMETER, A, B, file.scales[name])


def _of_stack(file: LoRAFile, name: str, place: str, weight: Weight, A: Tensor, B: Tensor) -> Stack:
    """Return the update of a stack of E matrices, of A [E·r, k] and B [d, r·E]. Raises FileError for others."""
    E, (d, k), rank = len(weight.value), weight.shape, rank_of(name, file.config)
    turned = (B.shape[0], A.shape[1]) == (k, d) if d != k else file.stacks_by_inputs
    if turned and not weight.transposed and name != place:
        A, B = transposed_in_file(A, B, rank)
    if A.shape[0] != E * rank or (B.shape[0], A.shape[1]) != (d, k):
        raise FileError(f"{place} is {list(weight.value.shape)}, the file's A {list(A.shape)} and B {list(B.shape)}")
    return Stack(*unstacked(A, B, rank), file.scales[name], transposed=weight.transposed)
