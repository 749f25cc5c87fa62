"""Optimizers of `torch.optim` by their names, and the learning rate at each point of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import nn

from deltaw.config import TrainConfig
from deltaw.errors import TrainError
from deltaw.training.flat import Flat

ADAM_STATE = 8
"""Bytes of Adam's state for a parameter: two moments in fp32."""

# A step of these in an entry depends on the others of its matrix, so they get A's and B's one by one
_BY_MATRIX = ("Adafactor", "Muon")
_MATRICES_ONLY = ("Muon",)
# These do a step in one operation, if asked to
_FUSED = ("AdamW", "Adam", "SGD")


class _Group(TypedDict, total=False):
    """A group of parameters, with settings of its own."""

    params: list[nn.Parameter]
    lr: float
    ratio: float
    weight_decay: float


def make(flat: Flat, config: TrainConfig) -> torch.optim.Optimizer:
    """Return `config.optimizer` over groups of parameters: A's, B's, and vectors, which do not decay.

    Each group has a `ratio` of its learning rate to `config.lr`; B's is `config.lr_ratio` (LoRA+, Hayou et al. 2024, arXiv
    2402.12354). A vector (a bias, a norm, DoRA's magnitude, (IA)³'s factors) does not grow from zero, so decay would only pull it
    away from its meaning.

    Raises TrainError for an optimizer that cannot train all of them.
    """
    optimizer: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, config.optimizer)
    vectors = [p for p in (*flat.matrices("A"), *flat.matrices("B")) if p.ndim != 2]
    if config.optimizer in _MATRICES_ONLY and vectors:
        raise TrainError(
            f"{config.optimizer} trains matrices only, and {len(vectors)} of this adapter's tensors are none."
        )
    tensors = flat.matrices if config.optimizer in _BY_MATRIX else flat.parameters
    apart = flat.vectors()
    excluded = {id(p) for p in apart}
    groups: list[_Group] = [
        {"params": [p for p in tensors(letter) if id(p) not in excluded], "lr": config.peak_lr * ratio, "ratio": ratio}
        for letter, ratio in (("A", 1.0), ("B", config.lr_ratio))
    ]
    if apart:
        groups.append({"params": apart, "lr": config.peak_lr, "ratio": 1.0, "weight_decay": 0.0})
    settings = {"lr": config.peak_lr, "weight_decay": config.weight_decay}
    devices = {p.device.type for group in groups for p in group["params"]}
    if config.optimizer in _FUSED and devices <= {"cpu", "cuda"}:
        settings["fused"] = True
    return optimizer(groups, **settings)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of A; B's follows by its ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]


def _clock(config: TrainConfig, seconds: float) -> float:
    """Return the share of `config.minutes` that has passed; 0 where no clock runs."""
    return seconds / (config.minutes * 60) if config.minutes else 0.0


def progress(config: TrainConfig, step: int, total_steps: int, seconds: float) -> float:
    """Return the share of the run that is over, by steps or by the clock (`config.minutes`), whichever is larger."""
    return max(step / total_steps, _clock(config, seconds))


def lr_factor(config: TrainConfig, step: int, total_steps: int, seconds: float) -> float:
    """Return the share of the peak learning rate for the step that follows `step` steps and `seconds` of training.

    Warm-up comes first, then the schedule, by steps or by the clock (`config.minutes`), whichever is further on.
    """
    share = config.warmup if config.warmup < 1 else 0.0  # of the clock: a warm-up given in steps knows no clock
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total_steps
    clock = _clock(config, seconds)
    warmed = max((step + 1) / (warmup + 1), clock / share if share else 0.0)
    if warmed < 1:
        return warmed
    if config.schedule == "constant":
        return 1.0
    by_steps = (step - warmup) / max(1.0, total_steps - warmup)
    share_over = min(1.0, max(0.0, by_steps, (clock - share) / (1.0 - share)))
    return 1.0 - share_over if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share_over))
