"""The training loop. A `LoopPlan` is the run as it was asked for, a `Loop` all that changes; the rest are functions of the two.

plan.py has the run as it was asked for, state.py what changes, steps.py the procedure. evaluation.py decides on held-out records,
checks.py on what may be wrong, spikes.py on what is unusual. log.py writes the lines of the log, and saved.py has what a run is
resumed from.
"""

from deltaw.training.loop.evaluation import evaluate, held_out_loss, relative_norm, should_evaluate
from deltaw.training.loop.log import log_line, peak_memory, seconds_left
from deltaw.training.loop.plan import LoopPlan
from deltaw.training.loop.saved import Saved, captured, restore
from deltaw.training.loop.state import Loop, LoopState, Taken
from deltaw.training.loop.steps import (
    Keep,
    after_step,
    drawing,
    keep_nothing,
    learn,
    opened,
    run_loop,
    settle,
    step,
    stop,
    take_step,
)

__all__ = [
    "Keep",
    "Loop",
    "LoopPlan",
    "LoopState",
    "Saved",
    "Taken",
    "after_step",
    "captured",
    "drawing",
    "evaluate",
    "held_out_loss",
    "keep_nothing",
    "learn",
    "log_line",
    "opened",
    "peak_memory",
    "relative_norm",
    "restore",
    "run_loop",
    "seconds_left",
    "settle",
    "should_evaluate",
    "step",
    "stop",
    "take_step",
]
