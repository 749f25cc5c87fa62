"""The optimizers of `torch.optim` by their names, over the adapter's flat buffers. Knows nothing of losses or schedules."""

from __future__ import annotations

from typing import Any

import torch

from deltaw.config import TrainConfig
from deltaw.training.flat import Flat

# What these do to an entry depends on the others of its matrix, so they get A's and B's one by one
_BY_MATRIX = ("Adafactor", "Muon")
# These do a step in one operation, if asked to
_FUSED = ("AdamW", "Adam", "SGD")


def make(flat: Flat, config: TrainConfig) -> torch.optim.Optimizer:
    """`config.optimizer` in two groups of parameters, A's and B's; each has a `ratio`, of its learning rate to `config.lr`.

    B's is `config.lr_ratio` (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    """
    kind = getattr(torch.optim, config.optimizer)
    find = flat.matrices if config.optimizer in _BY_MATRIX else flat.parameters
    groups = [
        {"params": find(letter), "lr": config.lr * ratio, "ratio": ratio}
        for letter, ratio in (("A", 1.0), ("B", config.lr_ratio))
    ]
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer in _FUSED and flat.parameters("A")[0].device.type in ("cpu", "cuda"):
        settings["fused"] = True
    return kind(groups, **settings)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of A; B's follows by its ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
