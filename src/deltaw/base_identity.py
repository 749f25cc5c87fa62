"""Fingerprints of the base under a model's adapters, as its parameters are now. A parameter's digests are kept. They hold for as
long as a checksum of all its bits stays the same: no count of changes sees all who write to a tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from deltaw.attached import base_tensors, owner_of, place_of, readers
from deltaw.files.fingerprint import Digest, Fingerprint, combined, digest
from deltaw.layers import in_few_bits
from deltaw.originals import Stamp, stamp


class _Known(NamedTuple):
    """A parameter's digests, and what shows that they still hold."""

    stamps: list[Stamp]
    digests: list[Digest]


_known: Any = WeakTensorKeyDictionary()
"""Parameter → _Known, for as long as the parameter lives."""


def base_fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> Fingerprint:
    """Of the base as it was before attach. Left out are those that an adapter has values of its own for
    (`without`, by any of their names): a new head is another one each time, a vocabulary may not have been resized yet."""
    return fingerprints(model, without=without)[0]


def fingerprints(
    model: nn.Module, *, without: Collection[str] = (), alone: Iterable[str] = ()
) -> tuple[Fingerprint, Fingerprint]:
    """`base_fingerprint`, and that of the parameters `alone`, which a checkpoint's files tell without the model. Each is read
    once."""
    owner = owner_of(model)
    gone = {id(p) for p, names in readers(model).items() if any(n in without for n in names)} if without else set()
    places = [place_of(owner, name) for name in alone]
    wanted = [id(module._parameters[own]) for module, own in places]
    digests: dict[int, list[Digest]] = {}
    for name, parameter, tensor in base_tensors(model):
        if id(parameter) not in gone or id(parameter) in wanted:
            digests[id(parameter)] = _digests(owner, name, parameter, tensor)
    base = chain.from_iterable(own for key, own in digests.items() if key not in gone)
    return combined(base), combined(chain.from_iterable(digests[key] for key in wanted))


def _digests(owner: nn.Module, name: str, parameter: nn.Parameter, tensor: Tensor) -> list[Digest]:
    """Of a parameter's values: one, or of a weight in few bits one for each tensor that it is kept in."""
    if tensor is not parameter:  # what it was before a merge
        return [digest(tensor)]
    layer, own = place_of(owner, name)
    form = in_few_bits(layer, own)
    content = [tensor.detach()] if form is None else form.content(layer)
    stamps, known = [stamp(t) for t in content], _known.get(parameter)
    if known is None or known.stamps != stamps:
        known = _known[parameter] = _Known(stamps, [digest(t) for t in content])
    return known.digests
