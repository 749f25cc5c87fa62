"""The training loop. A `LoopPlan` is the run as it was asked for, a `Loop` all that changes; the rest are functions of the two.

plan.py has the run as it was asked for, state.py what changes, steps.py the procedure. evaluation.py decides on held-out records,
checks.py on what may be wrong, and log.py writes the lines of the log.
"""

from deltaw.training.loop.evaluation import evaluate, held_out_loss, relative_norm, should_evaluate
from deltaw.training.loop.log import log_line, peak_memory, seconds_left
from deltaw.training.loop.plan import LoopPlan
from deltaw.training.loop.state import Loop, LoopState, Taken
from deltaw.training.loop.steps import after_step, drawing, learn, opened, run_loop, step, take_step

__all__ = [
    "Loop",
    "LoopPlan",
    "LoopState",
    "Taken",
    "after_step",
    "drawing",
    "evaluate",
    "held_out_loss",
    "learn",
    "log_line",
    "opened",
    "peak_memory",
    "relative_norm",
    "run_loop",
    "seconds_left",
    "should_evaluate",
    "step",
    "take_step",
]
