"""Checks of the tensors in an adapter's file: by themselves, and against its settings. No model code."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from deltaw.files.formats.peft.config import CONFIG, PeftConfig
from deltaw.files.formats.peft.keys import Sorted
from deltaw.files.formats.peft.ranks import pattern_problem, rank_in, rank_of
from deltaw.files.formats.peft.targets import saved_module, tokens_of
from deltaw.layers.tree import is_finite


def tensor_problems(sorted_: Sorted, tensors: Mapping[str, Tensor]) -> list[str]:
    """List what is wrong with the tensors by themselves: parts that are missing, shapes, dtypes, values that are not finite."""
    finite = _surely_finite(tensors.values())
    problems = [problem for layer, parts in sorted_.parts.items() for problem in _part_problems(layer, parts, finite)]
    if not problems and any(_largest(t) > _HALF for t in _whole_storages(tensors.values())):
        problems += [
            line for layer, parts in sorted_.parts.items() for line in _overflow(layer, parts["A"], parts["B"])
        ]
    values = *sorted_.whole.items(), *sorted_.rows.items(), *sorted_.copies.items(), *sorted_.originals.items()
    for name, value in values:
        # A copied module's counters are whole numbers; only a model tells whether they are its buffers
        problems += _value_problems(name, value, finite) if value.is_floating_point() or name in sorted_.rows else []
    problems += [
        f"{layer}: its rows of tokens are {list(rows.shape)}; they must be [n, e]"
        for layer, rows in sorted_.rows.items()
        if rows.ndim != 2
    ]
    return problems


def _part_problems(layer: str, parts: Mapping[str, Tensor], finite: bool) -> list[str]:
    """List what is wrong with one layer's low-rank update."""
    missing = [part for part in "AB" if part not in parts]
    if missing:
        return [f"{layer}: {missing[0]} is missing"]
    A, B = parts["A"], parts["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.numel() or not B.numel():
        return [f"{layer}: A is {tuple(A.shape)} and B {tuple(B.shape)}; they must be [r, k] and [d, r]"]
    if not A.is_floating_point() or not B.is_floating_point():
        return [f"{layer}: A is {A.dtype} and B {B.dtype}; they must be floating point"]
    problems = [
        f"{layer}: {part} has values that are not finite" for part in "AB" if not finite and not is_finite(parts[part])
    ]
    for part in parts.keys() - {"A", "B"}:
        if parts[part].shape != (B.shape[0],):
            problems.append(f"{layer}: its {part} is {list(parts[part].shape)}; it must be [{B.shape[0]}]")
        problems += _value_problems(f"{layer}: its {part}", parts[part], finite)
    return problems


def _value_problems(name: str, value: Tensor, finite: bool) -> list[str]:
    """List what is wrong with a value that stands in place of one of the base's."""
    if not value.is_floating_point():
        return [f"{name} is {value.dtype}; it must be floating point"]
    return [] if finite or is_finite(value) else [f"{name} has values that are not finite"]


_MOST = torch.finfo(torch.float32).max
_HALF = _MOST**0.5
"""Entries up to this one have products in float32."""


def _overflow(layer: str, A: Tensor, B: Tensor) -> list[str]:
    """List factors whose ΔW no float32 could hold: what comes of them is infinite, or a constant."""
    a, b = _largest(A), _largest(B)
    return [f"{layer}: A has entries of {a:.3g} and B of {b:.3g}, whose products overflow"] if a * b > _MOST else []


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute entry; 0 for a tensor without any."""
    floats = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return max(map(abs, map(float, torch.aminmax(floats)))) if tensor.numel() else 0.0


def _surely_finite(tensors: Collection[Tensor]) -> bool:
    """True only if all entries are finite, since a sum is finite only if its terms are. (One that overflows tells nothing.)"""
    sums = [t.sum(dtype=torch.float32) for t in _whole_storages(tensors)]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def _whole_storages(tensors: Collection[Tensor]) -> list[Tensor]:
    """Return the tensors of floating point, as one where they are all of a file: that takes one pass."""
    floats = [t for t in tensors if t.is_floating_point()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in floats}
    if len(storages) == len({t.dtype for t in tensors}) == 1:
        return [torch.empty(0, dtype=floats[0].dtype).set_(*storages.values())]
    return floats


def disagreements(sorted_: Sorted, config: PeftConfig, name: str) -> list[str]:
    """List where the tensors in the file `name` are others than the settings say."""
    problems = []
    for layer, parts in sorted_.parts.items():
        if unclear := pattern_problem(layer, config):
            problems.append(f"{layer}: {unclear}")
            continue
        rank, expected = rank_in(layer, parts["A"], config), rank_of(layer, config)
        if rank != expected:
            problems.append(f"{layer}: rank {rank} in {name}, {expected} in {CONFIG}")
        if ("magnitude" in parts) != config.use_dora:
            has = "a" if "magnitude" in parts else "no"
            problems.append(
                f"{layer}: {has} magnitude in {name}, use_dora is {str(config.use_dora).lower()} in {CONFIG}"
            )
    for layer, rows in sorted_.rows.items():
        ids = tokens_of(layer, config)
        if ids is None or len(ids) != len(rows):
            problems.append(f"{layer}: rows of {len(rows)} tokens in {name}, of {len(ids or ())} in {CONFIG}")
    modules = list(config.modules_to_save)
    if modules and not any(saved_module(parameter, config) for parameter in sorted_.whole):
        problems.append(f"{CONFIG}: modules_to_save is {modules!r}, but {name} has none of them")
    return problems
