"""The identity of the base under a model's adapters: hashes of its parameters as they are now.

Each call reads them, since no count of changes sees all who write to a tensor. What takes longer is cached, by the hash of the
values behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from deltaw.files.formats.fingerprint import DTYPES, FORMS, Digest, Fingerprint, combined, digest
from deltaw.layers.kinds import in_few_bits
from deltaw.layers.ops.checksums import Stamp, content_of, stamp
from deltaw.layers.processes.shards import full, whole
from deltaw.layers.tree import owner_of, place_of
from deltaw.model.merging.kept import base_tensors
from deltaw.model.record import adapted, find_record, readers

log = logging.getLogger("deltaw")


class _Contents:
    """Hashes of one tensor's content, cached while a checksum of it stays the same."""

    def __init__(self) -> None:
        self.stamp: Stamp | None = None
        self.hashes: dict[torch.dtype, bytes] = {}

    def read(self, values: Tensor) -> None:
        """Drop the hashes if the values are others than those that they are of."""
        now = stamp(values)
        if now != self.stamp:
            self.stamp, self.hashes = now, {values.dtype: now.checksum} if now.by == "host" else {}

    def of(self, values: Tensor, dtype: torch.dtype) -> bytes:
        """Return the hash of the values that were read, rounded to `dtype`."""
        if dtype not in self.hashes:
            self.hashes[dtype] = content_of(values, dtype)
        return self.hashes[dtype]


_contents: MutableMapping[nn.Parameter, list[_Contents]] = WeakTensorKeyDictionary()
"""Parameter → the cached hashes of each tensor that it is kept in, for as long as the parameter lives."""


def base_fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> Fingerprint | None:
    """Return the fingerprint of the base as it was before attach.

    Args:
        model: the base with its adapters.
        without: parameters to leave out, by any of their names: those that an adapter has values of its own for. A new head is
            another one each time, and a vocabulary may not have been resized yet.

    Returns:
        The fingerprint; None, which is logged, where some values are nowhere in memory (meta tensors).
    """
    with _merged_whole(model):
        hashes = _hashes(model, FORMS, _base(model, without))
    if hashes is None:
        log.warning("Some weights of the base are not in memory: a file that is saved from it names no base.")
    return None if hashes is None else Fingerprint(*hashes)


def base_hash(model: nn.Module, form: str, *, without: Collection[str] = ()) -> str | None:
    """Return one hash of `base_fingerprint` alone."""
    with _merged_whole(model):
        hashes = _hashes(model, (form,), _base(model, without))
    return None if hashes is None else hashes[0]


def weights_fingerprint(model: nn.Module, names: Iterable[str]) -> Fingerprint | None:
    """Return the fingerprint of these parameters alone, in this order: what a checkpoint's files tell without the model."""
    with _merged_whole(model):
        tensors = {id(p): (name, p, tensor) for name, p, tensor in base_tensors(model)}
        parameters = {alias: parameter for parameter, aliases in readers(model).items() for alias in aliases}
        hashes = _hashes(model, FORMS, (tensors[id(parameters[name])] for name in names))
    return None if hashes is None else Fingerprint(*hashes)


def _merged_whole(model: nn.Module) -> AbstractContextManager[None]:
    """Have merged weights whole, while open: what they were before is computed from all of their values."""
    record = find_record(model)
    return whole(model, lambda: adapted(model) if record is not None and record.merged else ())


_Named = Iterable[tuple[str, nn.Parameter, Tensor]]
"""Name, parameter of the base, and its value before attach."""


def _base(model: nn.Module, without: Collection[str]) -> _Named:
    """Yield the base's parameters but for those `without`."""
    left_out = {id(p) for p, names in readers(model).items() if any(n in without for n in names)} if without else ()
    return ((name, p, tensor) for name, p, tensor in base_tensors(model) if id(p) not in left_out)


def _hashes(model: nn.Module, forms: Sequence[str], tensors: _Named) -> list[str] | None:
    """Return the hashes of these forms; None where one needs values that are nowhere in memory."""
    digests: dict[str, list[Digest]] = {form: [] for form in forms}
    by_values, owner = any(form != DTYPES for form in forms), owner_of(model)
    for name, parameter, tensor in tensors:
        if parameter.is_meta and by_values:
            return None
        for part, contents in _parts(owner, name, parameter, tensor):
            values = full(part) if by_values else part
            if by_values:
                contents.read(values)
            for form in forms:
                digests[form].append(digest(values, form, contents.of))
    return [combined(digests[form]) for form in forms]


def _parts(owner: nn.Module, name: str, parameter: nn.Parameter, tensor: Tensor) -> Iterator[tuple[Tensor, _Contents]]:
    """Yield the tensors that a parameter's values are kept in, each with its hashes: one, or of a quantised weight several."""
    if tensor is not parameter:  # what it was before a merge
        yield tensor, _Contents()
        return
    layer, own_name = place_of(owner, name)
    quantised = in_few_bits(layer, own_name)
    parts = [tensor] if quantised is None else quantised.content(layer)
    kept = _contents.setdefault(parameter, [])
    kept += [_Contents() for _ in parts[len(kept) :]]
    yield from zip(parts, kept, strict=False)
