"""Held-out records: when their loss is taken, what follows from it, and the best adapter so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from deltaw.layers.processes.ranks import ALONE, Ranks
from deltaw.layers.processes.shards import whole
from deltaw.layers.tree import evaluating, owner_of
from deltaw.model.summary import updates
from deltaw.progress import HeldOut, Phase, say, tell
from deltaw.training.events import Evaluated
from deltaw.training.loop.checks import not_finite, warn
from deltaw.training.loop.plan import LoopPlan
from deltaw.training.loop.state import Loop, LoopState
from deltaw.training.losses import Loss, attention_for
from deltaw.training.optim import progress

# Below this ‖ΔW‖/‖W0‖ an update cannot be seen in any output; after this many steps that is worth a warning
_NOTHING_LEARNED, _AFTER_STEPS = 1e-5, 20
# With `minutes`, one more evaluation is made before the end only while evaluations took at most this share of the time
_EVALUATING = 0.2
# The fewest records of one evaluation's forward pass
_EVALUATED_TOGETHER = 8


def should_evaluate(plan: LoopPlan, state: LoopState, last_evaluation: float) -> bool:
    """Return whether held-out records are due: every `eval_every` steps, or at each tenth of the run; and at its end.

    With `minutes`, a tenth is skipped where evaluations would take too much of the time. `last_evaluation`: seconds of the last
    one.
    """
    if _is_last(plan, state):
        return True
    if plan.config.eval_every:
        return state.step % plan.config.eval_every == 0
    if tenths(plan, state) == state.tenths:
        return False
    return not plan.config.minutes or state.eval_seconds + last_evaluation <= _EVALUATING * state.seconds


def _is_last(plan: LoopPlan, state: LoopState) -> bool:
    """Return whether no step follows."""
    return state.step == plan.total_steps or bool(state.stopped)


def tenths(plan: LoopPlan, state: LoopState) -> int:
    """Return the tenths of the run that are over; as before where they decide nothing."""
    if _is_last(plan, state) or plan.config.eval_every:
        return state.tenths
    share = progress(plan.config, state.step, plan.total_steps, state.seconds)
    return int(10 * share + 1e-9)  # 1e-9: a tenth by rounding is a tenth


def evaluate(loop: Loop) -> None:
    """Take the held-out loss; with `patience` keep the best adapter or stop; warn when nothing was learned.

    A request to stop puts it off: then it is `due`. Raises TrainError for a loss that is not finite, unless there is a best
    adapter to go back to.
    """
    plan, state, began = loop.plan, loop.state, loop.plan.clock()
    together = max(plan.config.batch, _EVALUATED_TOGETHER)
    trees = plan.config.share != "off"
    judged = judge(
        plan.loss, plan.valid, batch=together, should_stop=plan.should_stop, trees=trees, ranks=plan.ranks, fellows=plan.fellows
    )  # fmt: skip
    loop.due = judged is None
    if judged is None:
        return
    loss, accuracy = judged
    state.valid_loss = loss
    if not math.isfinite(loss) and loop.best is None:
        raise not_finite(
            f"The loss on held-out records is {loss} after step {state.step}", plan.config.peak_lr, state.step
        )
    loop.last_evaluation = plan.ranks.of_first(plan.clock() - began)
    state.seconds = plan.ranks.of_first(plan.clock() - loop.began)
    state.eval_seconds += loop.last_evaluation
    if loss < state.best_loss:
        state.best_loss, state.best_step, state.without_gain = loss, state.step, 0
        if plan.config.patience:
            loop.best = [p.detach().clone() for p in loop.trainable]
    else:
        state.without_gain += 1
        if plan.config.patience and state.without_gain >= plan.config.patience:
            state.stopped = "early"
    tell(HeldOut(state.step, loss, accuracy, run=plan.adapter))
    plan.on_event(Evaluated(state.step, loss, state.best_loss, accuracy))
    tell(Phase("training", run=plan.adapter))
    if state.step >= _AFTER_STEPS and relative_norm(plan.model, plan.adapter) < _NOTHING_LEARNED:
        warn(
            loop,
            f"‖ΔW‖/‖W0‖ is still below {_NOTHING_LEARNED:g} after {state.step} steps: nothing is learned. "
            f"Is lr = {plan.config.peak_lr:g} ten times too small?",
        )


class Judged(NamedTuple):
    """Scores of held-out records."""

    loss: float
    """The mean of a prediction; of a causal model −log p per supervised token."""
    accuracy: float | None
    """Share of the records whose class is right; None for tasks without classes."""


def held_out_loss(loss: Loss, examples: Sequence[Any], *, batch: int) -> float:
    """Return the mean loss of a prediction over `examples`; of a causal model −log p per supervised token."""
    judged = judge(loss, examples, batch=batch)
    assert judged is not None
    return judged.loss


@torch.no_grad()
def judge(
    loss: Loss,
    examples: Sequence[Any],
    *,
    batch: int,
    should_stop: Callable[[], bool] = lambda: False,
    trees: bool = True,
    ranks: Ranks = ALONE,
    fellows: Ranks = ALONE,
) -> Judged | None:
    """Return what `examples` score; None where `should_stop`, which is asked before each batch, said so.

    trees: compute what records of a batch begin with alike once. ranks: the processes that score a part each. fellows: those
    that make each pass together.
    """
    totals, count, right, stopped = [], 0, [], False
    with evaluating(loss.model), attention_for(loss, examples, trees=trees):
        ordered = [examples[i] for i in loss.order(examples)]
        starts = range(0, len(ordered), batch)[ranks.rank :: ranks.count]
        passes = fellows.most(len(starts))
        for i in [*starts, *[-1] * (passes - len(starts))]:
            stopped = fellows.any(should_stop())
            if stopped:
                break
            if i < 0:  # the others need this process for theirs
                loss.judged(loss.collate(ordered[:1]))
                continue
            say("scoring the held-out records", i, len(ordered))
            total, number, correct = loss.judged(loss.collate(ordered[i : i + batch]))
            totals.append(total)
            count += number
            right += [] if correct is None else [correct]
    of_all = ranks.total(float(sum(totals)), count, float(sum(right)), len(right), stopped)
    nats, predictions, correct_ones, batches_of_classes, stops = of_all
    if stops:
        return None
    return Judged(nats / predictions, correct_ones / predictions if batches_of_classes else None)


def restore_best(loop: Loop) -> None:
    """Give the adapter the values of the best evaluation, where they were kept."""
    if loop.best is not None:
        with torch.no_grad():
            for parameter, best in zip(loop.trainable, loop.best, strict=True):
                parameter.copy_(best)


def relative_norm(model: nn.Module, name: str | None = None) -> float:
    """Return ‖ΔW‖/‖W0‖ over all of the adapter's layers together, without forming any ΔW."""
    owner = owner_of(model)
    moved = []
    for layer, update in updates(model, name).items():
        module = owner.get_submodule(layer)
        with whole(model, module.parameters):
            moved.append(update.moved(module))
    dw, w0 = sum(dw for dw, _ in moved), sum(w0 for _, w0 in moved)
    return (dw / w0) ** 0.5 if w0 else (math.inf if dw else 0.0)
