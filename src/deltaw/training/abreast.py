"""Several adapters trained over one base in memory, their steps taken in one pass: a batch holds the rows of each loop's own
step, and each row goes through its own loop's adapter. Knows loops and routes; nothing of what the candidates are tried for.

A row pays for its own adapter's arithmetic alone, so each loop comes out as it does by itself, to the rounding of the batch's
shape. (Dropout, the adapters' and the base's, drops out other entries than it would for one loop.)
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence

import torch

from deltaw.errors import TrainError
from deltaw.model.switch import route, using
from deltaw.training.loop import Loop


class Abreast:
    """`loops` over one model, each of an adapter of its own. At most `width` of them share a pass; with 1 they take turns.

    At each of `rungs`, shares of the run, the loops whose held-out losses are in the worse half end there (successive halving:
    Jamieson and Talwalkar 2016, arXiv 1502.07943), their states `stopped` "behind".
    """

    def __init__(self, loops: Sequence[Loop], width: int, rungs: Sequence[float] = ()) -> None:
        self.loops, self.width = loops, width
        self.rungs = sorted(rungs)
        self.failed: dict[str, TrainError] = {}
        """Adapter → why it could not go on: its loss was not finite. The others do."""

    def run(self) -> None:
        """Train all of them to their ends."""
        with contextlib.ExitStack() as stack:
            for loop in self.loops:
                with using(loop.model, loop.adapter):
                    stack.enter_context(loop.opened())
            while going := [loop for loop in self.loops if loop.goes_on]:
                for part in _portions(going, self.width):
                    self._step(part)
                if self.rungs and max(_done(loop) for loop in going) >= self.rungs[0]:
                    self.rungs.pop(0)
                    self._halve()

    def _step(self, loops: Sequence[Loop]) -> None:
        """One step of each."""
        began = time.monotonic()
        if len(loops) == 1:
            (loop,) = loops
            with using(loop.model, loop.adapter), self._caught(loop):
                loop.step()
            return
        drawn = [loop.drawn() for loop in loops]
        with loops[0].drawing(*loops[1:]):
            losses, counts = _backward(loops, drawn)
        share = (time.monotonic() - began) / len(loops)
        for loop, rows, loss, count in zip(loops, drawn, losses, counts, strict=True):
            began = time.monotonic()
            with using(loop.model, loop.adapter), self._caught(loop):
                values = loop.learn(rows, loss, count)
                loop.ended(values, share + time.monotonic() - began)

    @contextlib.contextmanager
    def _caught(self, loop: Loop) -> Iterator[None]:
        try:
            yield
        except TrainError as error:
            loop.state.stopped = "failed"
            self.failed[loop.adapter] = error

    def _halve(self) -> None:
        """Of those that are left, the better half goes on."""
        going = [loop for loop in self.loops if loop.goes_on]
        for loop in going:
            with using(loop.model, loop.adapter), self._caught(loop):
                loop.evaluate()
        going = sorted((loop for loop in going if loop.goes_on), key=_held_out)
        for loop in going[-(-len(going) // 2) :]:
            loop.state.stopped = "behind"


def _portions(loops: Sequence[Loop], width: int) -> Iterator[Sequence[Loop]]:
    for i in range(0, len(loops), width):
        yield loops[i : i + width]


def _done(loop: Loop) -> float:
    return loop.state.step / loop.total_steps


def _held_out(loop: Loop) -> float:
    found = loop.state.valid_loss
    return found if found is not None and math.isfinite(found) else math.inf


def _backward(loops: Sequence[Loop], drawn: Sequence[Sequence[object]]) -> tuple[list[torch.Tensor], list[int]]:
    """The gradients of each loop's step over its own rows; its mean loss, and the number of predictions that is over."""
    loss = loops[0].loss
    parts = [loop.parts(rows) for loop, rows in zip(loops, drawn, strict=True)]
    counts = [sum(loss.collate(part).targets for part in own) for own in parts]
    divisor = torch.tensor(counts, dtype=torch.float32)
    means = torch.zeros_like(loops[0].losses).repeat(len(loops))
    for together in itertools.zip_longest(*parts, fillvalue=()):
        names = [loop.adapter for loop, part in zip(loops, together, strict=True) for _ in part]
        owners = torch.tensor([i for i, part in enumerate(together) for _ in part])
        with route(loops[0].model, names):
            # The backward pass too: checkpointing computes layers in it again
            each, rows = loss.each(loss.collate([row for part in together for row in part]))
            sums = torch.zeros_like(means).index_add(0, owners[rows].to(each.device), each)
            own = sums / divisor.to(each.device)
            own.sum().backward()
        means += own.detach()
        for loop in loops:
            loop.flat.add_gradients()
    return list(means), counts
