"""Which base a model has under its adapters: fingerprints of its parameters, each of which is read once, and again only when it
has changed.
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
from deltaw.versions import version_of


class _Known(NamedTuple):
    """A parameter's digests, and what shows that they still hold."""

    version: list[tuple[int, int, int]]
    digests: list[Digest]


_known: Any = WeakTensorKeyDictionary()
"""Parameter → _Known, for as long as the parameter lives."""


def base_fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> Fingerprint:
    """Of the base as it was before attach. Left out are those that an adapter has values of its own for
    (`without`, by any of their names): a new head is another one each time, a vocabulary may not have been resized yet."""
    gone = {id(p) for p, names in readers(model).items() if any(n in without for n in names)} if without else ()
    every = (_digests(model, name, p, tensor) for name, p, tensor in base_tensors(model) if id(p) not in gone)
    return combined(chain.from_iterable(every))


def weights_fingerprint(model: nn.Module, names: Iterable[str]) -> Fingerprint:
    """Of these parameters alone: what a checkpoint's files tell without the model."""
    digests = {id(p): _digests(model, name, p, tensor) for name, p, tensor in base_tensors(model)}
    parameters = {name: parameter for parameter, own in readers(model).items() for name in own}
    return combined(chain.from_iterable(digests[id(parameters[name])] for name in names))


def _digests(model: nn.Module, name: str, parameter: nn.Parameter, tensor: Tensor) -> list[Digest]:
    """Of a parameter's values: one, or of a weight in few bits one for each tensor that it is kept in."""
    if tensor is not parameter:  # what it was before a merge
        return [digest(tensor)]
    layer, own = place_of(owner_of(model), name)
    form = in_few_bits(layer, own)
    stored = [parameter] if form is None else form.stored(layer)
    version, known = [version_of(t) for t in stored], _known.get(parameter)
    if known is None or known.version != version:
        content = [tensor] if form is None else form.content(layer)
        known = _known[parameter] = _Known(version, [digest(t) for t in content])
    return known.digests
