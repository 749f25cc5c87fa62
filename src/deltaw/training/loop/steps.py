"""The training loop: batches → loss → step, with evaluation, early stop and a clean way to be interrupted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltaw import progress
from deltaw.data.trees import tree_of
from deltaw.errors import TrainError, first_line
from deltaw.layers.ops.seeding import mixed, seeded
from deltaw.layers.tree import evaluating, owner_of, to_train
from deltaw.model.summary import updates
from deltaw.training import optim
from deltaw.training.attention import implementation, takes_trees
from deltaw.training.flat import Flat
from deltaw.training.loop import log
from deltaw.training.loop.checks import (
    Watched,
    check_reached,
    look_back,
    mask_bad,
    refuse_untrained,
    warn,
    warn_of_idle_settings,
)
from deltaw.training.loop.evaluation import evaluate, restore_best, should_evaluate, tenths
from deltaw.training.loop.plan import LoopPlan
from deltaw.training.loop.saved import Saved, restore
from deltaw.training.loop.spikes import mark
from deltaw.training.loop.state import Loop, LoopState, Taken
from deltaw.training.losses import CompletionLoss, attention_for
from deltaw.training.optim import lr_factor
from deltaw.training.together import largest_inputs, same_input


class Keep(Protocol):
    """Writes the states of loops, all after the same step. It must, rather than may, where `now` is true."""

    def __call__(self, loops: Sequence[Loop], *, now: bool) -> None: ...


def keep_nothing(loops: Sequence[Loop], *, now: bool) -> None:
    """Keep no state."""


def run_loop(
    plan: LoopPlan, state: LoopState | None = None, *, start: Saved | None = None, keep: Keep = keep_nothing
) -> LoopState:
    """Train to the end, the clock, an early stop or an interruption, and return `state`, which follows the loop meanwhile.

    Args:
        plan: the run.
        state: takes up the loop's progress.
        start: the state to go on from.
        keep: called after each step.

    Raises:
        TrainError: a loss is not finite.
        FileError: `start` is the state of another adapter.
    """
    state = LoopState() if state is None else state
    with opened(plan, state, start) as loop:
        settle([loop], keep)
        while loop.goes_on:
            step(loop)
            settle([loop], keep)
    return state


def settle(loops: Sequence[Loop], keep: Keep, *, now: bool = False) -> None:
    """Keep the states of loops that have taken a step, and stop the loops where that is asked for.

    The state is of a loop that goes on: a run that was stopped resumes as if it had not been.
    """
    going = [loop for loop in loops if loop.goes_on]
    stopping = bool(going) and going[0].plan.ranks.any(going[0].plan.should_stop())
    keep(loops, now=now or stopping or not going)
    if stopping:
        stop(going)


def stop(loops: Sequence[Loop]) -> None:
    """Stop loops as interrupted, with a line of the log for what they have learned since the last one."""
    for loop in loops:
        loop.state.stopped = "interrupted"
        _log_the_rest(loop)


def _log_the_rest(loop: Loop) -> None:
    if loop.logged.step < loop.state.step:
        log.tell(loop)


@contextlib.contextmanager
def opened(plan: LoopPlan, state: LoopState, start: Saved | None = None) -> Iterator[Loop]:
    """Yield a loop whose steps can be taken, from the beginning or from `start`. On leaving, the adapter holds what was learned.

    Raises TrainError when a loss is not finite, and FileError where `start` is the state of another adapter.
    """
    trees = plan.config.share != "off"
    with attention_for(plan.loss, [*plan.examples, *plan.valid], trees=trees), _flat(plan) as flat:
        loop = Loop(plan, state, flat)
        to_train(plan.model)
        if plan.config.gradient_checkpointing:
            _checkpoint_activations(plan.model)
        if start is None:
            warn_of_idle_settings(loop)
            if trees:
                _warn_of_no_trees(loop)
        else:
            restore(loop, start)
        plan.ranks.copy_first([p.detach() for p in loop.trainable])
        flat.refresh()
        if plan.valid and (start is None or loop.due):
            evaluate(loop)
        progress.tell(progress.Phase("taking the first step", run=plan.adapter))
        try:
            yield loop
            look_back(loop)
        finally:
            restore_best(loop)
            plan.model.eval()


def _warn_of_no_trees(loop: Loop) -> None:
    """Warn where records of the first step begin alike, and the model's attention is one that takes no trees."""
    plan = loop.plan
    if isinstance(plan.loss, CompletionLoss) and not takes_trees(plan.model):
        batch = plan.parts(plan.drawn(loop.state.step))[0]
        if tree_of(batch, 0, plan.loss.collate(batch).input_ids.numel()) is not None:
            why = (
                f"the model's attention is {implementation(plan.model)!r} in a way of its own, not transformers' 'sdpa'"
            )
            warn(loop, f"What records have in common is computed for each of them: {why}.")


def _flat(plan: LoopPlan) -> Flat:
    """Return the adapter in flat buffers. A forward pass over the first record shows which layers read the same tensor, and in 8
    bits which columns of that are large: the same ones when the run is resumed."""
    model = plan.model
    of_adapter = updates(model, plan.adapter)
    plain = {n: plain for n, u in of_adapter.items() if (plain := u.plain) is not None}
    one = plan.loss.collate(plan.examples[:1])
    with evaluating(model), torch.no_grad():
        plan.loss(one)  # the first call tries the ways to the loss, which would count as calls of the layers
        groups = same_input(plain, lambda: plan.loss(one))
        largest = largest_inputs(plain, lambda: plan.loss(one)) if plan.config.frozen_dtype == "int8" else {}
    layers = {name: owner_of(model).get_submodule(name) for name in plain}
    others = {n: u for n, u in of_adapter.items() if n not in plain}
    return Flat(layers, plain, groups, others, int8=largest)


# --- a step -----------------------------------------------------------------------------------------------------


def step(loop: Loop) -> None:
    """Take one optimizer step and do what is due after it: a line of the log, an evaluation, a stop."""
    clock = loop.plan.clock
    began = clock()
    with drawing(loop):
        taken = take_step(loop)
    after_step(loop, taken, clock() - began)


def drawing(*loops: Loop) -> contextlib.AbstractContextManager[None]:
    """Draw random numbers, while open, from the seeds and step numbers of the loops that share a pass, and from nothing else.

    So dropout's masks do not depend on what is drawn between two steps. Of several processes each draws its own.
    """
    numbers = [number for loop in loops for number in (loop.plan.config.seed, loop.state.step)]
    numbers += [loop.plan.ranks.rank for loop in loops if not loop.plan.ranks.is_first]
    return seeded(mixed("step", *numbers), loops[0].devices)


def take_step(loop: Loop) -> Taken:
    """Take a step over a batch of records, whose loss is divided by all its supervised tokens, in whatever process they are.

    On a GPU nothing here waits for it: losses are added up there, and whether they are finite is read a step late.
    """
    plan = loop.plan
    rows = plan.drawn(loop.state.step)
    batches = [plan.loss.collate(part) for part in plan.here(loop.state.step)]
    supervised = int(plan.ranks.total(sum(batch.targets for batch in batches))[0])
    lacking = plan.fellows.most(len(batches)) - len(batches)
    loss = sum((_backward(loop, batch, supervised) for batch in batches), start=torch.zeros_like(loop.losses))
    for _ in range(lacking):  # passes that the others need this process for
        _backward(loop, plan.loss.collate(plan.examples[:1]), supervised, weight=0.0)
    for gathered in (loss, *loop.flat.gradients()):
        plan.ranks.add_up(gathered)
    shared = int(plan.ranks.total(sum(plan.loss.shared(batch) for batch in batches))[0])  # known once a tree was tried
    return learn(loop, rows, loss, supervised, shared)


def _backward(loop: Loop, batch: Any, supervised: int, weight: float = 1.0) -> Tensor:
    """Add a batch's gradients, times a weight; return its share of the step's mean loss, fp32 scalar."""
    total, _ = loop.plan.loss(batch)
    mean = weight * total / supervised
    if not mean.requires_grad:
        refuse_untrained([*updates(loop.plan.model, loop.plan.adapter)])
    torch.autograd.backward(loop.scaler.scale(mean))
    loop.flat.add_gradients()
    return mean.detach()


def learn(loop: Loop, rows: Sequence[Any], loss: Tensor, supervised: int, shared: int = 0) -> Taken:
    """Take the optimizer's step with the gradients that are there.

    They are of `loss`, the mean over the `supervised` predictions of the examples `rows`, of whose tokens `shared` were not
    computed.
    """
    config, state = loop.plan.config, loop.state
    lr = config.peak_lr * lr_factor(config, state.step, loop.plan.total_steps, state.seconds)
    optim.set_lr(loop.optimizer, lr)
    if state.step == 0:
        check_reached(loop)
    loop.scaler.unscale_(loop.optimizer)
    gradients = [parameter.grad for parameter in loop.trainable if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    now = Watched(state.step, loss, norm, lr, [row.place for row in rows])
    if not loop.check_late and not now.is_sound(loop.scaler):
        nothing_learned = state.supervised == 0 and state.step + 1 == loop.plan.total_steps
        if loop.skipped >= config.skip_bad_steps or nothing_learned:
            raise now.error(loop.flat.not_finite())
        return _passed_over(loop, now)
    nn.utils.clip_grads_with_norm_(loop.trainable, config.clip or math.inf, norm)
    if loop.check_late:
        mask_bad(loop, now)
    else:
        mark(loop, now)
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    loop.flat.zero_gradients()
    loop.flat.refresh()
    loop.losses += loss * supervised
    state.step += 1
    state.records += len(rows)
    state.tokens += sum(e.length for e in rows)
    state.shared += shared
    state.supervised += supervised
    return Taken(lr, norm)


def _passed_over(loop: Loop, now: Watched) -> Taken:
    """Go on after a bad step without it: neither A nor B, nor the optimizer's moments, see its gradients."""
    loop.skipped += 1
    warn(loop, f"Step {now.step + 1} was passed over: {first_line(now.error(loop.flat.not_finite()))}")
    loop.scaler.update(loop.scaler.get_scale() if loop.scaler.is_enabled() else None)
    loop.flat.zero_gradients()
    loop.state.step += 1
    return Taken(now.lr, now.pair[1])


def after_step(loop: Loop, taken: Taken, seconds: float) -> None:
    """Do what is due after a step that took so many seconds."""
    plan, state = loop.plan, loop.state
    loop.taken = taken
    state.seconds = plan.ranks.of_first(plan.clock() - loop.began)
    state.step_seconds += seconds
    if progress.is_watched():
        progress.tell(log.tick(loop, taken.lr))
    if state.step % plan.config.log_every == 0 or state.step in (1, plan.total_steps):
        log.tell(loop)
    if plan.config.minutes and state.seconds >= plan.config.minutes * 60:
        state.stopped = "minutes"
    if plan.valid:
        due = should_evaluate(plan, state, loop.last_evaluation)
        state.tenths = tenths(plan, state)
        if due:
            evaluate(loop)
    if state.stopped:
        _log_the_rest(loop)


def _checkpoint_activations(model: nn.Module) -> None:
    """Compute activations again in the backward pass. transformers names the call anew from version 5 on."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": False})
            return
    raise TrainError(
        f"A {type(model).__name__} has no way to compute activations again. Train it without --gradient-checkpointing."
    )
