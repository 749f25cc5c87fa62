"""The optimizers of `torch.optim` by their names, over the adapter's parameters. Knows nothing of losses or schedules."""

from __future__ import annotations

from typing import Any

import torch

from deltaw.config import TrainConfig
from deltaw.errors import TrainError
from deltaw.training.flat import Flat

ADAM_STATE = 8
"""Bytes of Adam's state for a parameter: two moments in fp32."""

# What these do to an entry depends on the others of its matrix, so they get A's and B's one by one
_BY_MATRIX = ("Adafactor", "Muon")
_MATRICES_ONLY = ("Muon",)
# These do a step in one operation, if asked to
_FUSED = ("AdamW", "Adam", "SGD")


def make(flat: Flat, config: TrainConfig) -> torch.optim.Optimizer:
    """`config.optimizer` in groups of parameters: A's, B's, and vectors, which do not decay. Each has a `ratio`, of its learning
    rate to `config.lr`; B's is `config.lr_ratio` (LoRA+, Hayou et al. 2024, arXiv 2402.12354).

    A vector (a bias, a norm, DoRA's magnitude, (IA)³'s factors) is no sum that grows from zero, so decay would only pull it
    away from what it stands for. Raises TrainError for an optimizer that cannot train all of them.
    """
    kind = getattr(torch.optim, config.optimizer)
    vectors = [p for p in (*flat.matrices("A"), *flat.matrices("B")) if p.ndim != 2]
    if config.optimizer in _MATRICES_ONLY and vectors:
        raise TrainError(
            f"{config.optimizer} trains matrices only, and {len(vectors)} of this adapter's tensors are none."
        )
    find = flat.matrices if config.optimizer in _BY_MATRIX else flat.parameters
    apart = flat.vectors()
    excluded = {id(p) for p in apart}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in find(letter) if id(p) not in excluded], "lr": config.lr * ratio, "ratio": ratio}
        for letter, ratio in (("A", 1.0), ("B", config.lr_ratio))
    ]
    if apart:
        groups.append({"params": apart, "lr": config.lr, "ratio": 1.0, "weight_decay": 0.0})
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    devices = {p.device.type for group in groups for p in group["params"]}
    if config.optimizer in _FUSED and devices <= {"cpu", "cuda"}:
        settings["fused"] = True
    return kind(groups, **settings)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of A; B's follows by its ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
