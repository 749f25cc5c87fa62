"""A run of the loop as it was asked for. It never changes while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from deltaw.config import TrainConfig
from deltaw.data import Order
from deltaw.data.groups import groups_of
from deltaw.layers.processes.ranks import ALONE, Ranks
from deltaw.training.events import Event
from deltaw.training.losses import Loss


@dataclass(frozen=True, eq=False)
class LoopPlan:
    """A run of the loop as it was asked for. The loss's model carries the adapter, attached and active."""

    loss: Loss
    examples: Sequence[Any]
    """Examples that `loss.collate` takes; each has a `length`."""
    valid: Sequence[Any]
    """The same, held out; empty where nothing is held out."""
    config: TrainConfig
    on_event: Callable[[Event], None] = lambda event: None
    should_stop: Callable[[], bool] = lambda: False
    """Asked after each step."""
    adapter: str = "default"
    clock: Callable[[], float] = time.monotonic
    """Seconds since some fixed point."""
    check_late: bool | None = None
    """Check that a step is finite after the next one is computed. None: on a GPU, which would have to be waited for at once."""
    ranks: Ranks = ALONE
    """The processes that share the steps."""

    @property
    def model(self) -> nn.Module:
        """The model that carries the adapter."""
        return self.loss.model

    @property
    def fellows(self) -> Ranks:
        """The processes that make each pass together, as the base is dealt out over them; ALONE where each has it whole."""
        return self.ranks if self.config.shard == "full" else ALONE

    @cached_property
    def order(self) -> Order:
        """The records of each step: a function of the seed and the step's number alone."""
        return self.order_of(grouped=self.config.share == "group")

    def order_of(self, *, grouped: bool) -> Order:
        """Return the order of the records where those that begin alike meet in a step, or do not."""
        config, lengths = self.config, [e.length for e in self.examples]
        groups = self.groups if grouped else None
        return Order(lengths, batch=config.batch, seed=config.seed, tokens=config.batch_tokens, groups=groups)

    @cached_property
    def groups(self) -> list[list[int]]:
        """The examples' numbers in groups that begin alike. Only examples of a text that is written on have these."""
        return groups_of([e.input_ids for e in self.examples])

    @cached_property
    def total_steps(self) -> int:
        """Steps of the whole run, unless something stops it before."""
        return self.config.steps or self.order.steps(self.config.epochs or 1.0)

    def drawn(self, step: int) -> list[Any]:
        """Return the examples of a step, counted from 0."""
        return [self.examples[i] for i in self.order.at(step)]

    def here(self, step: int) -> list[Sequence[Any]]:
        """Return this process's examples of a step, in those of one forward pass each."""
        return self.parts(self.ranks.part(self.drawn(step)))

    def parts(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        """Split examples of a step into those of one forward pass each."""
        size = self.config.micro_batch or max(1, len(rows))
        return [rows[i : i + size] for i in range(0, len(rows), size)]
