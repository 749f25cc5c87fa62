"""The optimizers of `torch.optim` by their names, and the learning rate at each point of a run."""

from __future__ import annotations

import math
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


def _clock(config: TrainConfig, seconds: float) -> float:
    """Share of `config.minutes` that has passed; 0 where no clock runs."""
    return seconds / (config.minutes * 60) if config.minutes else 0.0


def progress(config: TrainConfig, step: int, total_steps: int, seconds: float) -> float:
    """Share of the run that is done, by steps or by the clock (`config.minutes`), whichever is further on."""
    return max(step / total_steps, _clock(config, seconds))


def lr_factor(config: TrainConfig, step: int, total_steps: int, seconds: float) -> float:
    """Share of the peak learning rate for the step that follows `step` steps and `seconds` of training: warm-up, then the
    schedule, by steps done or by the clock (`config.minutes`), whichever is further on."""
    share = config.warmup if config.warmup < 1 else 0.0  # of the clock: a warm-up given in steps knows no clock
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total_steps
    clock = _clock(config, seconds)
    warmed = max((step + 1) / (warmup + 1), clock / share if share else 0.0)
    if warmed < 1:
        return warmed
    if config.schedule == "constant":
        return 1.0
    by_steps = (step - warmup) / max(1.0, total_steps - warmup)
    done = min(1.0, max(0.0, by_steps, (clock - share) / (1.0 - share)))
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
