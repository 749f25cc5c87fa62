"""loralib's checkpoints ↔ PEFT's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import FileError, shown
from deltaw.files.convert.places import ORIGIN, check_is_adapter
from deltaw.files.formats import loralib, peft
from deltaw.files.formats.atomic import replacing
from deltaw.files.formats.others.foreign import scaled
from deltaw.files.formats.peft import LoRAFile, config_for
from deltaw.files.formats.peft.metadata import SLICES, slices_of
from deltaw.files.formats.peft.ranks import commonest
from deltaw.layers.kinds import Runs
from deltaw.methods.updates.lowrank import sliced_rows

log = logging.getLogger("deltaw")

# Names of heads that PEFT trains of a classifier of texts
_HEADS = ("classifier", "score")


def from_loralib(checkpoint: loralib.Checkpoint, dst: Path) -> Path:
    """Write loralib's checkpoint as a PEFT folder."""
    modules, bias, task = _trained_whole(checkpoint)
    factors, scales = checkpoint.factors, checkpoint.scales
    ranks = {layer: A.shape[0] for layer, (A, _) in factors.items()}
    file = LoRAFile(
        factors,
        scales,
        config_for(
            ranks, scales, target_modules=sorted(factors), task=task, bias=bias, modules_to_save=modules or None
        ),
        {ORIGIN: "loralib"} | ({SLICES: json.dumps(checkpoint.slices)} if checkpoint.slices else {}),
        embeddings=frozenset(checkpoint.embeddings),
        kernels=checkpoint.kernels,
        whole=checkpoint.whole,
    )
    return peft.write(dst, file)


def _trained_whole(checkpoint: loralib.Checkpoint) -> tuple[list[str], str, str | None]:
    """Return the modules that PEFT is to copy, which biases train, and PEFT's name of the task, where the head tells it."""
    weighted = {name.rpartition(".")[0] for name in checkpoint.whole if not name.endswith(".bias")}
    biased = {name.rpartition(".")[0] for name in checkpoint.whole if name.endswith(".bias")}
    alone = biased - weighted
    bias = "none" if not alone else "lora_only" if alone <= checkpoint.factors.keys() else "all"
    roots = {module.split(".")[0] for module in weighted} & {*_HEADS}
    heads = {module for module in weighted if module.split(".")[0] in roots}
    # PEFT copies a classifier as one module, all of whose parameters must then be in the file
    whole = len(roots) == 1 and all(module in roots or module in biased for module in heads)
    modules = {*(weighted - heads), *roots} if whole else weighted
    return sorted(modules), bias, "SEQ_CLS" if whole else None


def to_loralib(src: Path, dst: Path, alpha: float | None) -> Path:
    """Write a checkpoint that loralib's layers load, of ranks as they are, for one α.

    Where a layer's scale is another one than α/r, its B carries the difference.
    """
    check_is_adapter(dst, lambda: loralib.check_holds_adapter(dst))
    file, problems = peft.read(src), list[str]()
    problems += [f"{layer}: DoRA's magnitude" for layer in file.magnitudes]
    problems += [f"{layer}: rows of some tokens" for layer in file.rows]
    problems += [f"{layer}: a bias that its base has none of" for layer in file.biases]
    problems += [f"{layer}: a convolution, of another form there" for layer in file.kernels]
    problems += [f"{file.shown(layer)}: a stack of matrices" for layer in file.factors if file.is_stack(layer)]
    if problems:
        raise FileError(f"loralib has no form for what is in {src}:", problems)
    if file.copies:
        log.warning(
            "Left out, as the base's own values, which PEFT keeps beside an update: %s.", shown(sorted(file.copies))
        )
    slices, chosen = slices_of(file.metadata), alpha_for_loralib(file) if alpha is None else alpha
    state: dict[str, Tensor] = dict(file.whole)
    for layer, (A, B) in file.factors.items():
        merged = _merged_rows(B, slices[layer]) if layer in slices else None
        rows = B if merged is None else merged
        factor = file.scales[layer] * rows.shape[1] / chosen
        state[f"{layer}.lora_A"] = A
        state[f"{layer}.lora_B"] = scaled(rows, 1.0 if abs(factor - 1.0) < 1e-9 else factor)
    with replacing(dst) as temporary:
        torch.save({key: t.detach().contiguous().clone() for key, t in state.items()}, temporary)
    return dst


def alpha_for_loralib(file: LoRAFile) -> float:
    """Return the α that most layers have in a checkpoint, where a merged layer's r is that of one of its parts."""
    slices = slices_of(file.metadata)
    ranks = {layer: len(A) // max(1, len(slices.get(layer, {}))) for layer, (A, _) in file.factors.items()}
    alphas = [round(file.scales[layer] * r, 9) for layer, r in ranks.items()]
    return commonest(alphas, 1.0)


def _merged_rows(B: Tensor, slices: Mapping[str, Runs]) -> Tensor | None:
    """Return a MergedLinear's B [d/parts·n, r] of slices that are its parts, in order; None for others."""
    runs = [of_slice[0] for of_slice in slices.values() if len(of_slice) == 1]
    height = runs[0][1] - runs[0][0] if runs else 0
    even = height and all(b - a == height and a % height == 0 for a, b in runs) and B.shape[0] % height == 0
    if len(runs) != len(slices) or not even or runs != sorted(runs):
        return None
    return sliced_rows(B, slices)
