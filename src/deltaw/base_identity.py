"""Which base a model has under its adapters: fingerprints of its parameters, each of which is read once, and again only when it
has changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from deltaw.attached import base_tensors, owner_of, place_of, readers
from deltaw.files.fingerprint import Digest, Fingerprint, combined, digest
from deltaw.versions import version_of


class _Known(NamedTuple):
    """A parameter's digest, and what shows that it still holds."""

    version: tuple[int, int, int]
    digest: Digest


_known: Any = WeakTensorKeyDictionary()
"""Parameter → _Known, for as long as the parameter lives."""


def base_fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> Fingerprint:
    """Of the base as it was before attach. Left out are those that an adapter has values of its own for
    (`without`, by any of their names): a new head is another one each time, a vocabulary may not have been resized yet."""
    gone = {id(p) for p, names in readers(model).items() if any(n in without for n in names)} if without else ()
    return combined(_digest(p, tensor) for _, p, tensor in base_tensors(model) if id(p) not in gone)


def weights_fingerprint(model: nn.Module, names: Iterable[str]) -> Fingerprint:
    """Of these parameters alone: what a checkpoint's files tell without the model."""
    digests = {id(parameter): _digest(parameter, tensor) for _, parameter, tensor in base_tensors(model)}
    owner: Any = owner_of(model)
    places = (place_of(owner, name) for name in names)
    return combined(digests[id(module._parameters[own])] for module, own in places)


def _digest(parameter: nn.Parameter, tensor: Tensor) -> Digest:
    if tensor is not parameter:  # what it was before a merge
        return digest(tensor)
    version, known = version_of(parameter), _known.get(parameter)
    if known is None or known.version != version:
        known = _known[parameter] = _Known(version, digest(tensor))
    return known.digest
