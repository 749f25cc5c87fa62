"""Memory at the peak of training, by part; what fits in how much of it. Knows what a step on the meta device says, or an estimate
where the model does not run there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from deltaw.config import TrainConfig
from deltaw.errors import DeltaWError
from deltaw.methods.targets import blocks_of
from deltaw.model.attach import attach, detach
from deltaw.model.summary import AdapterSummary, summary
from deltaw.runs.memory.step import Step, step
from deltaw.training.optim import ADAM_STATE

log = logging.getLogger("deltaw")

_MOST_ROWS = 1 << 20

# Of what comes and goes in a step, what malloc holds besides in holes that nothing fits, and the same of what checkpointing
# recomputes block by block. Measured, with glibc's: results/plan.json
_HOLES, _HOLES_CHECKPOINTED = 0.25, 0.4


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of training, by part."""

    process: int
    """Interpreter and libraries, on a CPU; what a GPU's driver takes is not counted."""
    weights: int
    """Of the frozen base, in its precision."""
    adapter: int
    """The trained values, and their copy in the precision that steps compute in."""
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass, copies of trained weights in the base's precision among it."""
    working: int
    """The most that is held beyond that: a chunk of the logits, or what the backward pass is at."""
    logits: int
    """What the head and the loss hold: `working`, or less than it."""
    heap: int = 0
    """What malloc holds besides, on a CPU."""
    estimated: bool = False
    """The model's forward does not run without weights: activations are 34 bytes a token, dimension and block in 16 bits
    (Korthikanti et al. 2022, arXiv 2205.05198, without its attention scores), and the rest of the passes is not known."""

    @property
    def total(self) -> int:
        parts = (
            self.process,
            self.weights,
            self.adapter,
            self.gradients,
            self.optimizer,
            self.activations,
            self.working,
            self.heap,
        )
        return sum(parts)


class Taken(NamedTuple):
    """A step's bytes, run on the meta device or estimated."""

    step: Step
    estimated: bool


def memory_of(passes: Taken, process: int, weights: int, plain: Taken) -> Memory:
    """A step's bytes beside those of the process, which are 0 on a GPU, and the frozen base. `plain`: the same step without
    checkpointing."""
    s, share = passes.step, _HOLES if passes is plain else _HOLES_CHECKPOINTED
    heap = round(share * (plain.step.activations + plain.step.working)) if process else 0
    return Memory(
        process,
        weights,
        s.adapter,
        s.gradients,
        s.optimizer,
        s.activations,
        s.working,
        s.logits,
        heap,
        passes.estimated,
    )


def counts(model: nn.Module, method: Any) -> AdapterSummary:
    """The method's adapter on this model: parameters, bytes, and the layers that it has."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        attach(model, method)
    try:
        return summary(model).adapters["default"]
    finally:
        detach(model)


def taken(
    model: Any, method: Any, examples: Sequence[Any], config: TrainConfig, device: str, loss_of: Callable[[Any], Any],
    tokens: int,
) -> Taken:  # fmt: skip
    """A step of `method` on a meta model, over `examples` of that many `tokens` with their padding."""
    try:
        return Taken(step(model, method, examples, config, device, loss_of), estimated=False)
    except DeltaWError:
        raise
    except Exception as error:  # a model's own code may ask tensors for values in any way
        log.debug("%s does not run on the meta device: %s", type(model).__name__, error)
        return Taken(_estimate(model, method, tokens), estimated=True)


def _estimate(model: Any, method: Any, tokens: int) -> Step:
    """Where a model's forward needs values: 34 bytes for each token, dimension and block in 16 bits, Adam's two moments."""
    adapter = counts(model, method)
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    width = getattr(text, "hidden_size", 0) * next(model.parameters()).element_size() // 2
    return Step(
        adapter.bytes,
        adapter.bytes,
        ADAM_STATE * adapter.parameters,
        34 * tokens * width * len(blocks_of(model)),
        0,
        0,
        0,
    )


def largest(needed: Callable[[int], int], room: int) -> int:
    """The most rows whose memory, which grows with them, is within `room`; 0 where not one fits."""
    if needed(1) > room:
        return 0
    low, high = 1, 2
    while high <= _MOST_ROWS and needed(high) <= room:
        # About linear, so the next guess is where the line meets the room, and a row more
        slope = max(1, needed(high) - needed(low)) / (high - low)
        low, high = high, high + max(1, int((room - needed(high)) / slope)) + 1
    while high - low > 1:
        slope = max(1, needed(high) - needed(low)) / (high - low)
        middle = min(high - 1, max(low + 1, low + int((room - needed(low)) / slope)))
        low, high = (middle, high) if needed(middle) <= room else (low, middle)
    return low
