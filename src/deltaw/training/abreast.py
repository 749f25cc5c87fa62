"""Several adapters trained over one base in memory, their steps batched: a pass holds the rows of each loop's step, and each row
goes through its own loop's adapter. Knows loops and routes; nothing of what the candidates are tried for.

A row pays for its own adapter's arithmetic alone, so each loop comes out as it does by itself, to the rounding of the batch's
shape. (Dropout, the adapters' and the base's, drops other entries than it would for one loop.)
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deltaw.errors import TrainError
from deltaw.model.switch import route, using
from deltaw.training.attention import without_trees
from deltaw.training.loop import (
    Keep,
    Loop,
    LoopPlan,
    LoopState,
    Saved,
    after_step,
    drawing,
    evaluate,
    keep_nothing,
    learn,
    opened,
    settle,
    step,
    stop,
)  # fmt: skip
from deltaw.training.losses import CompletionLoss


@dataclass(frozen=True)
class Ended:
    """The runs of `run_loops`, once all of them are over."""

    states: list[LoopState]
    """One for each plan, in their order."""
    failed: dict[str, TrainError]
    """Adapter → why it could not continue: its loss was not finite. The others do."""


def run_loops(
    plans: Sequence[LoopPlan],
    width: int,
    rungs: Sequence[float] = (),
    *,
    starts: Sequence[Saved] = (),
    keep: Keep = keep_nothing,
) -> Ended:
    """Train `plans` over one model to their ends, each an adapter of its own. At most `width` of them share a pass; with 1 they
    take turns.

    At each of `rungs`, shares of the run, the loops whose held-out losses are in the worse half end there (successive halving:
    Jamieson and Talwalkar 2016, arXiv 1502.07943), their states `stopped` "behind".

    Args:
        plans: the runs.
        width: how many share a pass at most.
        rungs: where halves end.
        starts: the states that the loops go on from, all after the same step or ended before; none to begin.
        keep: called after each step of all loops.
    """
    ahead = sorted(rungs)
    with contextlib.ExitStack() as stack:
        loops = []
        for plan, start in itertools.zip_longest(plans, starts):
            with using(plan.model, plan.adapter):
                loops.append(stack.enter_context(opened(plan, LoopState(), start)))
        settle(loops, keep)
        while going := [loop for loop in loops if loop.goes_on]:
            if _is_at_a_rung(going, ahead):
                keep(loops, now=True)  # from here a run resumes that is stopped in the middle of the evaluations
                if _halve(loops):
                    keep(loops, now=True)
                continue
            for i in range(0, len(going), width):
                _step_together(going[i : i + width])
            settle(loops, keep, now=len(going) > sum(loop.goes_on for loop in loops))
    return Ended(
        [loop.state for loop in loops], {loop.plan.adapter: TrainError(loop.failed) for loop in loops if loop.failed}
    )


def _is_at_a_rung(going: Sequence[Loop], rungs: Sequence[float]) -> bool:
    """Return whether loops have come to the next of `rungs`."""
    passed = max(loop.rungs for loop in going)
    share = max(loop.state.step / loop.plan.total_steps for loop in going)
    return passed < len(rungs) and share >= rungs[passed]


def _step_together(loops: Sequence[Loop]) -> None:
    """Take one step of each loop in one pass."""
    if len(loops) == 1:
        with _acting(loops[0]):
            step(loops[0])
        return
    clock = loops[0].plan.clock
    began = clock()
    drawn = [loop.plan.drawn(loop.state.step) for loop in loops]
    with drawing(*loops):
        losses, counts, shared = _backward(loops, drawn)
    share = (clock() - began) / len(loops)
    for loop, rows, loss, count in zip(loops, drawn, losses, counts, strict=True):
        began = clock()
        with _acting(loop):
            taken = learn(loop, rows, loss, count, shared)
            after_step(loop, taken, share + clock() - began)


@contextlib.contextmanager
def _acting(loop: Loop) -> Iterator[None]:
    """Use the loop's adapter, while open. A TrainError ends this loop alone."""
    with using(loop.plan.model, loop.plan.adapter):
        try:
            yield
        except TrainError as error:
            loop.state.stopped = "failed"
            loop.failed = str(error)


def _halve(loops: Sequence[Loop]) -> bool:
    """Stop the worse half of the loops that are left. Return False where all were stopped, as that was asked for meanwhile."""
    for loop in loops:
        if loop.goes_on:
            with _acting(loop):
                evaluate(loop)
    going = sorted((loop for loop in loops if loop.goes_on), key=_held_out)
    if any(loop.due for loop in going):
        stop(going)
        return False
    for loop in going:
        loop.rungs += 1
    for loop in going[-(-len(going) // 2) :]:
        loop.state.stopped = "behind"
    return True


def _held_out(loop: Loop) -> float:
    """Return the loop's last held-out loss; infinite where it is not finite."""
    loss = loop.state.valid_loss
    return loss if loss is not None and math.isfinite(loss) else math.inf


@contextlib.contextmanager
def _pass(
    loops: Sequence[Loop], parts: Sequence[Sequence[Any]]
) -> Iterator[tuple[Callable[[], tuple[torch.Tensor, torch.Tensor]], int]]:
    """Yield what computes the losses of each loop's rows by its own adapter, and their rows, loop after loop; and how many tokens
    of each loop this saves.

    Loops with the same rows have the same tree. Other rows have none: what two adapters make of the same tokens is not the same.
    """
    loss, model, names = loops[0].plan.loss, loops[0].plan.model, [loop.plan.adapter for loop in loops]
    if isinstance(loss, CompletionLoss) and all(part == parts[0] for part in parts):
        batch = loss.collate(parts[0])
        with using(model, names[0]):
            loss.decide(batch)
        rows = 1 if batch.tree is not None and loss.trees else len(parts[0])
        with route(model, [name for name in names for _ in range(rows)]):
            yield partial(loss.each, batch, len(loops)), loss.shared(batch)
        return
    whole = loss.collate([row for part in parts for row in part])
    with route(model, [name for name, part in zip(names, parts, strict=True) for _ in part]), without_trees(model):
        yield partial(loss.each, whole), 0


def _backward(loops: Sequence[Loop], drawn: Sequence[Sequence[object]]) -> tuple[list[torch.Tensor], list[int], int]:
    """Add the gradients of each loop's step over its own rows. Return its mean loss, fp32 scalar, how many predictions that is
    over, and how many of the tokens of each loop were not computed, as its other rows have them too."""
    loss = loops[0].plan.loss
    parts = [loop.plan.parts(rows) for loop, rows in zip(loops, drawn, strict=True)]
    counts = [sum(loss.collate(part).targets for part in of_loop) for of_loop in parts]
    divisor = torch.tensor(counts, dtype=torch.float32)
    means = torch.zeros_like(loops[0].losses).repeat(len(loops))
    shared = 0
    for part_of_each in itertools.zip_longest(*parts, fillvalue=()):
        owners = torch.tensor([i for i, part in enumerate(part_of_each) for _ in part])
        with _pass(loops, part_of_each) as (losses_of, saved):
            # The backward pass too: checkpointing computes layers in it again
            losses, rows = losses_of()
            sums = torch.zeros_like(means).index_add(0, owners[rows].to(losses.device), losses)
            of_loops = sums / divisor.to(losses.device)
            torch.autograd.backward(of_loops.sum())
        means += of_loops.detach()
        shared += saved
        for loop in loops:
            loop.flat.add_gradients()
    return list(means), counts, shared
