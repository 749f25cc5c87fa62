"""Layers that other versions of transformers, and wrappers, give other names: an adapter's file by this model's. Knows names, no
model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from deltaw.errors import FileError, listing
from deltaw.files.method_file import MethodFile
from deltaw.files.peft import SLICES, LoRAFile, slices_of
from deltaw.layers.names import (
    common_prefix,
    found_as,
    other_names,
    plain_names,
    unwrapped,
    unwrapped_pattern,
    without_peft_prefix,
)

log = logging.getLogger("deltaw")

T = TypeVar("T")


def renamed(file: LoRAFile, known: Collection[str]) -> LoRAFile:
    """The file with this model's names (`known`: of its modules) for those layers that go by another one here: without what
    wrappers put into names, or by another version of transformers. It logs which. Raises FileError for two names of one."""
    if not file.wrapped and all(layer in known for layer in file.factors) and not (file.whole or file.rows):
        return file
    names = [*file.factors, *file.rows, *(name.rpartition(".")[0] for name in file.whole)]
    found = Renaming(known, file.wrapped, [name.partition(".base_layer")[0] for name in names])
    module, parameter = found.module, found.parameter
    made = replace(
        file,
        factors=_by(module, file.factors), scales=_by(module, file.scales), magnitudes=_by(module, file.magnitudes),
        biases=_by(module, file.biases), rows=_by(module, file.rows), whole=_by(parameter, file.whole),
        copies=_by(parameter, file.copies), originals=_by(parameter, file.originals),
        embeddings=frozenset(map(module, file.embeddings)), kernels=_by(module, file.kernels), metadata=_metadata(module, file),
        wrapped=None, unclear=frozenset(map(module, file.unclear)),
    )  # fmt: skip
    found.log()
    return made


def renamed_method(file: MethodFile, known: Collection[str]) -> MethodFile:
    """`renamed`, of an adapter of another method: its tensors, and the layers that its settings name."""
    found = Renaming(known, None, [])

    def tensor(name: str) -> str:
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            if (new := found.known_as(".".join(parts[:cut]))) is not None:
                return ".".join([new, *parts[cut:]])
        return name

    def settings(value: Any) -> Any:
        if isinstance(value, list):
            return [settings(inner) for inner in value]
        return (found.known_as(value) if isinstance(value, str) and "." in value else None) or value

    made = replace(
        file, tensors=_by(tensor, file.tensors), inputs=frozenset(found.known_as(n) or n for n in file.inputs),
        settings={key: settings(value) for key, value in file.settings.items()},
    )  # fmt: skip
    found.log()
    return made


def plainly_named_method(file: MethodFile) -> MethodFile:
    """`plainly_named`, of an adapter of another method."""
    return replace(
        file, tensors=_by(unwrapped, file.tensors), inputs=frozenset(map(unwrapped, file.inputs)),
        settings=_without_wrappers(file.settings), config=_without_wrappers(file.config),
        metadata=_without_wrappers(file.metadata),
    )  # fmt: skip


def plainly_named(file: LoRAFile) -> LoRAFile:
    """The file of a model that has wrappers inside, by the names that its modules have without them."""
    names = [*file.factors, *file.rows, *file.whole, *file.copies]
    if all(unwrapped(name) == name for name in names):
        return file
    return replace(
        file,
        factors=_by(unwrapped, file.factors), scales=_by(unwrapped, file.scales), magnitudes=_by(unwrapped, file.magnitudes),
        biases=_by(unwrapped, file.biases), rows=_by(unwrapped, file.rows), whole=_by(unwrapped, file.whole),
        copies=_by(unwrapped, file.copies), embeddings=frozenset(map(unwrapped, file.embeddings)),
        kernels=_by(unwrapped, file.kernels), config=_without_wrappers(file.config), metadata=_without_wrappers(file.metadata),
    )  # fmt: skip


def _without_wrappers(value: Any) -> Any:
    """Settings with names and patterns of names in them."""
    if isinstance(value, Mapping):
        return {_without_wrappers(key): _without_wrappers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_wrappers(inner) for inner in value]
    return unwrapped_pattern(value) if isinstance(value, str) else value


class Renaming:
    """This model's names (`known`) of the modules that a file names, and which of them are others."""

    def __init__(self, known: Collection[str], wrapped: str | None, names: Sequence[str]) -> None:
        self.known, self.plain = known, plain_names(known)
        self.wrapped = {} if wrapped is None else {wrapped: unwrapped(without_peft_prefix(wrapped))}
        self.other: dict[str, str] = {}
        self.outer = common_prefix(names, known, self.plain)

    def module(self, name: str) -> str:
        """This model's name of a module, or of a part of PEFT's wrapper around one; the name itself where it has none."""
        outer, inside, part = name.partition(".base_layer")
        new = self.known_as(outer)
        if new is None and not inside:  # a parameter that has no layer
            outer, inside, part = name.rpartition(".")
            new = self.known_as(outer) if outer else None
        return name if new is None else f"{new}{inside}{part}"

    def known_as(self, name: str) -> str | None:
        """This model's name of a module; None where it has none."""
        new = found_as(name.removeprefix(self.outer), self.known, self.plain)
        if new is not None:
            if new != name:
                self.wrapped[name] = new
            return new
        places = (
            place
            for other in other_names(unwrapped(name.removeprefix(self.outer)))
            if (place := found_as(other, self.known, self.plain)) is not None
        )
        new = next(places, None)
        if new is not None:
            self.other[name] = new
        return new

    def parameter(self, name: str) -> str:
        layer, _, own_name = name.rpartition(".")
        return f"{self.module(layer)}.{own_name}"

    def log(self) -> None:
        """Say which names are others, in one line each for wrappers and for versions."""
        if self.wrapped:
            old, new = next(iter(self.wrapped.items()))
            log.warning(
                "Names of wrappers (torch.compile, DDP, FSDP) are left out or put in: %s is read as %s.", old, new
            )
        if self.other:
            old, new = next(iter(self.other.items()))
            log.warning(
                "%d layers of the adapter have other names in this model: %s is %s here, for one.",
                len(self.other),
                old,
                new,
            )


def _metadata(module: Callable[[str], str], file: LoRAFile) -> dict[str, str]:
    """With the names of the layers that have slices."""
    slices = slices_of(file)
    return {**file.metadata, SLICES: json.dumps(_by(module, slices))} if slices else file.metadata


def _by(new: Callable[[str], str], values: Mapping[str, T]) -> dict[str, T]:
    """Values by new names. Raises FileError for names that become one."""
    names: dict[str, list[str]] = {}
    for name in values:
        names.setdefault(new(name), []).append(name)
    twice = [
        f"{' and '.join(map(repr, old))} are {name!r} in this model" for name, old in names.items() if len(old) > 1
    ]
    if twice:
        raise FileError(listing("The adapter's file has two updates of one layer:", twice))
    return {name: values[old[0]] for name, old in names.items()}
