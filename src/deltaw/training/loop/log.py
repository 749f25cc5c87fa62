"""The lines of the log: loss, speed, memory and the time that is left."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import psutil
import torch

from deltaw.progress import Tick
from deltaw.training.events import Stepped
from deltaw.training.loop.plan import LoopPlan
from deltaw.training.loop.state import Loop, LoopState, Taken

_THIS_PROCESS = psutil.Process()


def tell(loop: Loop) -> None:
    """Tell a line of the log, of the last step. On a GPU this waits for it.

    Where all steps since the last line were passed over, there is none: nothing has a loss.
    """
    state, taken = loop.state, loop.taken
    if state.supervised == loop.logged.supervised:
        return
    assert taken is not None
    state.loss_sum += float(loop.losses)
    loop.losses.zero_()
    before, loop.logged = loop.logged, replace(state)
    line = log_line(loop.plan, state, before, taken)
    state.last_loss = line.loss
    state.first_loss = line.loss if state.first_loss is None else state.first_loss
    loop.plan.on_event(line)


def log_line(plan: LoopPlan, state: LoopState, before: LoopState, taken: Taken) -> Stepped:
    """Return the log's line of a step. Loss and speed are of the steps since `before`."""
    norm = float(taken.grad_norm)
    seconds = max(state.step_seconds - before.step_seconds, 1e-9)
    return Stepped(
        state.step,
        loss=(state.loss_sum - before.loss_sum) / max(1, state.supervised - before.supervised),
        lr=taken.lr,
        grad_norm=norm if math.isfinite(norm) else None,
        seconds=state.seconds,
        tokens=state.tokens,
        supervised=state.supervised,
        tokens_per_second=(state.tokens - before.tokens) / seconds,
        memory=peak_memory(),
        seconds_left=seconds_left(plan, state),
        total_steps=plan.total_steps,
    )


def tick(loop: Loop, lr: float) -> Tick:
    """Return the notice of the last step. Nothing here waits for a GPU: the loss is the last one that is known."""
    plan, state = loop.plan, loop.state
    memory, on_gpu = memory_now()
    return Tick(
        state.step,
        plan.total_steps,
        epoch=state.records / len(plan.examples),
        loss=loop.usual.losses[-1] if loop.usual.losses else None,
        lr=lr,
        tokens=state.tokens,
        step_seconds=state.step_seconds,
        seconds_left=seconds_left(plan, state),
        memory=memory,
        on_gpu=on_gpu,
        run=plan.adapter,
    )


def seconds_left(plan: LoopPlan, state: LoopState) -> float:
    """Return the seconds to the end, by the steps to come or by the clock, whichever ends first."""
    left = state.step_seconds / state.step * (plan.total_steps - state.step)
    minutes = plan.config.minutes
    return min(left, max(0.0, minutes * 60 - state.seconds)) if minutes else left


def memory_now() -> tuple[int, bool]:
    """Return the bytes that this process holds now, and whether they are a GPU's: where one is in use, they are."""
    if torch.cuda.is_available() and (allocated := torch.cuda.memory_allocated()):
        return allocated, True
    return int(_THIS_PROCESS.memory_info().rss), False


def peak_memory() -> int:
    """Return the most bytes that this process has held so far, on the GPU where one is in use."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # psutil has a peak on Windows alone

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
