"""Training and evaluation mode of a model's modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from deltaw.passes import with_statistics


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, the whole model is in evaluation mode; on leaving, each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def to_train(model: nn.Module) -> None:
    """Put a model in training mode, but for norms with running statistics, which are the base's: a pass in training mode would
    change them, no adapter holds them, and each row would depend on the others of its batch."""
    model.train()
    for _, module in with_statistics(model):
        module.eval()
