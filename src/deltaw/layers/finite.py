"""NaN and infinity in a model's own tensors, which are looked for once something is wrong, and not on every load."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deltaw.layers.tree import base_modules, dotted


def not_finite_in(model: nn.Module) -> list[str]:
    """Return the names of the base's parameters and stored buffers with NaN or infinity; the adapters' are not looked at.

    A pass over the weights: about 0.1 s for each GB.
    """
    return list(dict.fromkeys(name for name, tensor in _stored(model) if not is_finite(tensor)))


def is_finite(tensor: Tensor) -> bool:
    """Return whether all entries are finite; those of integers are, and those of a tensor without values (meta)."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    dense = tensor.detach()
    dense = dense.float() if dense.element_size() == 1 else dense  # 8-bit floats have no arithmetic
    # A sum is finite only if its terms are; one that overflows tells nothing
    return bool(torch.isfinite(dense.sum())) or bool(torch.isfinite(dense).all())


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the base that a checkpoint has, once, by its first name."""
    seen: set[int] = set()
    for name, module in base_modules(model):
        computed = module._non_persistent_buffers_set  # a mask may hold infinity on purpose
        buffers = {own: tensor for own, tensor in module._buffers.items() if own not in computed}
        for own, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield dotted(name, own), tensor
