"""Which base a model has under its adapters: hashes of its parameters, each of which is read once, and again only when it has
changed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from deltaw.attached import base_tensors, owner_of, place_of, readers
from deltaw.files.fingerprint import DTYPES, FORMS, Digest, Fingerprint, combined, content_of, digest
from deltaw.layers import in_few_bits
from deltaw.versions import version_of

log = logging.getLogger("deltaw")


class _Known(NamedTuple):
    """Hashes of a parameter's contents, and what shows that they still hold."""

    version: list[tuple[int, int, int]]
    contents: dict[tuple[int, torch.dtype], bytes]
    """Which of the tensors that it is kept in, the dtype that it was rounded to → hash."""


_known: Any = WeakTensorKeyDictionary()
"""Parameter → _Known, for as long as the parameter lives."""


def base_fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> Fingerprint | None:
    """The fingerprint of the base as it was before attach; None where some of its values are nowhere in memory (meta tensors).
    Left out are those that an adapter has values of its own for (`without`, by any of their names): a new head is another one
    each time, a vocabulary may not have been resized yet."""
    hashes = _hashes(model, FORMS, _base(model, without))
    if hashes is None:
        log.warning("Some weights of the base are not in memory: a file that is saved from it names no base.")
    return None if hashes is None else Fingerprint(*hashes)


def base_hash(model: nn.Module, form: str, *, without: Collection[str] = ()) -> str | None:
    """One hash of `base_fingerprint` alone."""
    hashes = _hashes(model, (form,), _base(model, without))
    return None if hashes is None else hashes[0]


def weights_fingerprint(model: nn.Module, names: Iterable[str]) -> Fingerprint | None:
    """The fingerprint of these parameters alone, in this order: what a checkpoint's files tell without the model."""
    tensors = {id(p): (name, p, tensor) for name, p, tensor in base_tensors(model)}
    owner: Any = owner_of(model)
    places = (place_of(owner, name) for name in names)
    hashes = _hashes(model, FORMS, (tensors[id(module._parameters[own])] for module, own in places))
    return None if hashes is None else Fingerprint(*hashes)


_Named = Iterable[tuple[str, nn.Parameter, Tensor]]


def _base(model: nn.Module, without: Collection[str]) -> _Named:
    gone = {id(p) for p, names in readers(model).items() if any(n in without for n in names)} if without else ()
    return ((name, p, tensor) for name, p, tensor in base_tensors(model) if id(p) not in gone)


def _hashes(model: nn.Module, forms: Sequence[str], tensors: _Named) -> list[str] | None:
    """The hashes of these forms; None where one needs values that are nowhere."""
    digests: list[list[Digest]] = [[] for _ in forms]
    for name, parameter, tensor in tensors:
        if parameter.is_meta and any(form != DTYPES for form in forms):
            return None
        for form, own in zip(forms, digests, strict=True):
            own += _digests(model, name, parameter, tensor, form)
    return [combined(own) for own in digests]


def _digests(model: nn.Module, name: str, parameter: nn.Parameter, tensor: Tensor, form: str) -> Iterator[Digest]:
    """A parameter's parts in a hash: one, or of a weight in few bits one for each tensor that it is kept in."""
    if tensor is not parameter:  # what it was before a merge
        yield digest(tensor, form)
        return
    layer, own = place_of(owner_of(model), name)
    few_bits = in_few_bits(layer, own)
    stored = [parameter] if few_bits is None else few_bits.stored(layer)
    version, known = [version_of(t) for t in stored], _known.get(parameter)
    if known is None or known.version != version:
        known = _known[parameter] = _Known(version, {})
    contents = known.contents
    for number, part in enumerate([tensor] if few_bits is None else few_bits.content(layer)):

        def remembered(values: Tensor, dtype: torch.dtype, number: int = number) -> bytes:
            if (number, dtype) not in contents:
                contents[number, dtype] = content_of(values, dtype)
            return contents[number, dtype]

        yield digest(part, form, remembered)
