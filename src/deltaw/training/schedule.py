"""How far a run has come, and its learning rate there."""

from __future__ import annotations

import math

from deltaw.config import TrainConfig


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
