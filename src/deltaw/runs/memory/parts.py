"""Memory at the peak of training, by part, and the largest batch within a given amount.

The figures come from a step on the meta device, or from an estimate where the model does not run there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from deltaw.config import TrainConfig
from deltaw.methods.plan import Method
from deltaw.methods.targets import blocks_of
from deltaw.model.attach import attach, detach
from deltaw.model.inputs import text_config
from deltaw.model.summary import AdapterSummary, summary
from deltaw.runs.memory.step import Record, Step, step
from deltaw.training.losses import Loss
from deltaw.training.optim import ADAM_STATE

log = logging.getLogger("deltaw")

_MOST_ROWS = 1 << 20

# malloc's holes that nothing fits, as a share of the activations and working memory; more where checkpointing recomputes block
# by block. Measured with glibc's: results/plan.json
_HOLES, _HOLES_CHECKPOINTED = 0.25, 0.4

NEEDS_VALUES = (RuntimeError, TypeError, ValueError, AttributeError)
"""Errors of code that asks meta tensors for values.

RuntimeError (and NotImplementedError): torch, for an operator without a kernel or shape there, or a value that is read.
TypeError: numpy, and a model's class that is not made from its config alone. ValueError: a model that checks its inputs.
AttributeError: a model without a config.
"""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of training, by part."""

    process: int
    """Interpreter and libraries on a CPU; 0 on a GPU, whose driver is not counted."""
    weights: int
    """The frozen base in its dtype."""
    adapter: int
    """The trained values, and their copy in the dtype that steps compute in."""
    gradients: int
    optimizer: int
    activations: int
    """Kept by the forward pass for the backward pass, with copies of trained weights in the base's dtype."""
    working: int
    """The most that is held beyond the activations: a chunk of the logits, or one block's backward pass."""
    logits: int
    """Held by the head and the loss: a part of `working`, not of the total."""
    heap: int = 0
    """Held by malloc besides, on a CPU."""
    estimated: bool = False
    """True if the model's forward does not run without weights.

    Activations are then 34 bytes a token, dimension and block in 16 bits (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1,
    without the attention scores). The rest of the passes is unknown and counts 0."""

    @property
    def total(self) -> int:
        """The sum of the parts."""
        passes = self.activations + self.working + self.heap
        return self.process + self.weights + self.adapter + self.gradients + self.optimizer + passes


class Taken(NamedTuple):
    """A step, run on the meta device or estimated."""

    step: Step
    estimated: bool


def memory_of(passes: Taken, process: int, weights: int, plain: Taken) -> Memory:
    """Return the memory of a step.

    Args:
        passes: The step, with checkpointing if the run has it.
        process: Bytes of the process; 0 on a GPU.
        weights: Bytes of the frozen base.
        plain: The same step without checkpointing; `passes` itself where the run has none.
    """
    share = _HOLES if passes is plain else _HOLES_CHECKPOINTED
    heap = round(share * (plain.step.activations + plain.step.working)) if process else 0
    s = passes.step
    return Memory(
        process, weights, s.adapter, s.gradients, s.optimizer, s.activations, s.working, s.logits, heap, passes.estimated
    )  # fmt: skip


def counts(model: nn.Module, method: Method) -> AdapterSummary:
    """Return the parameters, bytes and layers of the method's adapter on this model. Raises TargetError where it does not fit."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        attach(model, method)
    try:
        return summary(model).adapters["default"]
    finally:
        detach(model)


def taken(
    model: nn.Module, method: Method, examples: Sequence[Record], config: TrainConfig, device: str,
    loss_of: Callable[[], Loss], tokens: int,
) -> Taken:  # fmt: skip
    """Return a step of `method` on a meta model, over `examples` of so many `tokens`, padding included."""
    try:
        return Taken(step(model, method, examples, config, device, loss_of), estimated=False)
    except NEEDS_VALUES as error:
        log.debug("%s does not run on the meta device: %s", type(model).__name__, error)
        return Taken(_estimate(model, method, tokens), estimated=True)


def _estimate(model: nn.Module, method: Method, tokens: int) -> Step:
    """A step of a model whose forward needs values: `Memory.estimated`'s activations, and Adam's two moments."""
    adapter = counts(model, method)
    width = getattr(text_config(model), "hidden_size", 0) * next(model.parameters()).element_size() // 2
    activations = 34 * tokens * width * len(blocks_of(model))
    return Step(
        adapter.bytes, adapter.bytes, ADAM_STATE * adapter.parameters, activations, working=0, logits=0, flops=0
    )


def largest(needed: Callable[[int], int], room: int) -> int:
    """Return the most rows whose memory `needed(rows)` is within `room`; 0 where not one fits. Memory grows with the rows."""
    needed = functools.cache(needed)
    if needed(1) > room:
        return 0
    low, high = 1, 2
    while high <= _MOST_ROWS and needed(high) <= room:
        # Memory is about linear in the rows: guess where the line meets the room, and one row more
        slope = max(1, needed(high) - needed(low)) / (high - low)
        low, high = high, high + max(1, int((room - needed(high)) / slope)) + 1
    while high - low > 1:
        slope = max(1, needed(high) - needed(low)) / (high - low)
        middle = min(high - 1, max(low + 1, low + int((room - needed(low)) / slope)))
        low, high = (middle, high) if needed(middle) <= room else (low, middle)
    return low
