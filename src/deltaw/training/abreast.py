"""Several adapters trained over one base in memory, their steps batched: a pass holds the rows of each loop's step, and each row
goes through its own loop's adapter. Knows loops and routes; nothing of what the candidates are tried for.

A row pays for its own adapter's arithmetic alone, so each loop comes out as it does by itself, to the rounding of the batch's
shape. (Dropout, the adapters' and the base's, drops other entries than it would for one loop.)
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from deltaw.errors import TrainError
from deltaw.model.switch import route, using
from deltaw.training.loop import Loop, LoopPlan, LoopState, after_step, drawing, evaluate, learn, opened, step


@dataclass(frozen=True)
class Ended:
    """The runs of `run_loops`, once all of them are over."""

    states: list[LoopState]
    """One for each plan, in their order."""
    failed: dict[str, TrainError]
    """Adapter → why it could not continue: its loss was not finite. The others do."""


def run_loops(plans: Sequence[LoopPlan], width: int, rungs: Sequence[float] = ()) -> Ended:
    """Train `plans` over one model to their ends, each an adapter of its own. At most `width` of them share a pass; with 1 they
    take turns.

    At each of `rungs`, shares of the run, the loops whose held-out losses are in the worse half end there (successive halving:
    Jamieson and Talwalkar 2016, arXiv 1502.07943), their states `stopped` "behind".
    """
    left = sorted(rungs)
    failed: dict[str, TrainError] = {}
    with contextlib.ExitStack() as stack:
        loops = []
        for plan in plans:
            with using(plan.model, plan.adapter):
                loops.append(stack.enter_context(opened(plan, LoopState())))
        while going := [loop for loop in loops if loop.goes_on]:
            for i in range(0, len(going), width):
                _step_together(going[i : i + width], failed)
            if left and max(loop.state.step / loop.plan.total_steps for loop in going) >= left[0]:
                left.pop(0)
                _halve(loops, failed)
    return Ended([loop.state for loop in loops], failed)


def _step_together(loops: Sequence[Loop], failed: dict[str, TrainError]) -> None:
    """Take one step of each loop in one pass."""
    if len(loops) == 1:
        with _acting(loops[0], failed):
            step(loops[0])
        return
    clock = loops[0].plan.clock
    began = clock()
    drawn = [loop.plan.drawn(loop.state.step) for loop in loops]
    with drawing(*loops):
        losses, counts = _backward(loops, drawn)
    share = (clock() - began) / len(loops)
    for loop, rows, loss, count in zip(loops, drawn, losses, counts, strict=True):
        began = clock()
        with _acting(loop, failed):
            taken = learn(loop, rows, loss, count)
            after_step(loop, taken, share + clock() - began)


@contextlib.contextmanager
def _acting(loop: Loop, failed: dict[str, TrainError]) -> Iterator[None]:
    """Use the loop's adapter, while open. A TrainError ends this loop alone."""
    with using(loop.plan.model, loop.plan.adapter):
        try:
            yield
        except TrainError as error:
            loop.state.stopped = "failed"
            failed[loop.plan.adapter] = error


def _halve(loops: Sequence[Loop], failed: dict[str, TrainError]) -> None:
    """Stop the worse half of the loops that are left."""
    for loop in loops:
        if loop.goes_on:
            with _acting(loop, failed):
                evaluate(loop)
    going = sorted((loop for loop in loops if loop.goes_on), key=_held_out)
    for loop in going[-(-len(going) // 2) :]:
        loop.state.stopped = "behind"


def _held_out(loop: Loop) -> float:
    """Return the loop's last held-out loss; infinite where it is not finite."""
    loss = loop.state.valid_loss
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _backward(loops: Sequence[Loop], drawn: Sequence[Sequence[object]]) -> tuple[list[torch.Tensor], list[int]]:
    """Add the gradients of each loop's step over its own rows. Return its mean loss, fp32 scalar, and how many predictions that
    is over."""
    loss = loops[0].plan.loss
    parts = [loop.plan.parts(rows) for loop, rows in zip(loops, drawn, strict=True)]
    counts = [sum(loss.collate(part).targets for part in of_loop) for of_loop in parts]
    divisor = torch.tensor(counts, dtype=torch.float32)
    means = torch.zeros_like(loops[0].losses).repeat(len(loops))
    for shared in itertools.zip_longest(*parts, fillvalue=()):
        names = [loop.plan.adapter for loop, part in zip(loops, shared, strict=True) for _ in part]
        owners = torch.tensor([i for i, part in enumerate(shared) for _ in part])
        with route(loops[0].plan.model, names):
            # The backward pass too: checkpointing computes layers in it again
            losses, rows = loss.each(loss.collate([row for part in shared for row in part]))
            sums = torch.zeros_like(means).index_add(0, owners[rows].to(losses.device), losses)
            of_loops = sums / divisor.to(losses.device)
            torch.autograd.backward(of_loops.sum())
        means += of_loops.detach()
        for loop in loops:
            loop.flat.add_gradients()
    return list(means), counts
