"""The training loop: batches → loss → step, with evaluation, early stop and a clean way to be interrupted.

A `LoopPlan` is the run as it was asked for and never changes. A `Loop` holds all that changes: with its plan it decides every
step to come. The rest are functions of the two.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, NoReturn

import psutil
import torch
from torch import Tensor, nn

from deltaw.config import TrainConfig
from deltaw.data import Order
from deltaw.errors import TrainError, shown
from deltaw.layers.ops.seeding import devices_of, mixed, seeded
from deltaw.layers.tree import evaluating, owner_of, to_train
from deltaw.model.summary import updates
from deltaw.training import optim
from deltaw.training.attention import short_row_attention
from deltaw.training.events import Evaluated, Event, Stepped, Warned
from deltaw.training.flat import Flat
from deltaw.training.losses import Loss
from deltaw.training.optim import lr_factor, progress
from deltaw.training.together import same_input

# Below this ‖ΔW‖/‖W0‖ an update cannot be seen in any output; after this many steps that is worth a warning
_NOTHING_LEARNED, _AFTER_STEPS = 1e-5, 20
# With `minutes`, one more evaluation is made before the end only while evaluations took at most this share of the time
_EVALUATING = 0.2
# The fewest records of one evaluation's forward pass
_EVALUATED_TOGETHER = 8


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

    @property
    def model(self) -> nn.Module:
        """The model that carries the adapter."""
        return self.loss.model

    @cached_property
    def order(self) -> Order:
        """The records of each step: a function of the seed and the step's number alone."""
        config, lengths = self.config, [e.length for e in self.examples]
        return Order(lengths, batch=config.batch, seed=config.seed, tokens=config.batch_tokens)

    @cached_property
    def total_steps(self) -> int:
        """Steps of the whole run, unless something stops it before."""
        return self.config.steps or self.order.steps(self.config.epochs)

    def drawn(self, step: int) -> list[Any]:
        """Return the examples of a step, counted from 0."""
        return [self.examples[i] for i in self.order.at(step)]

    def parts(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        """Split a step's examples into those of one forward pass each."""
        size = self.config.micro_batch or len(rows)
        return [rows[i : i + size] for i in range(0, len(rows), size)]


@dataclass
class LoopState:
    """Progress of a loop in plain numbers. Counts are over the whole run."""

    step: int = 0
    seconds: float = 0.0
    """Since the start, evaluations included."""
    step_seconds: float = 0.0
    """In optimizer steps alone."""
    eval_seconds: float = 0.0
    """In evaluations."""
    tokens: int = 0
    supervised: int = 0
    records: int = 0
    valid_loss: float | None = None
    """The last held-out loss."""
    best_loss: float = math.inf
    best_step: int = 0
    without_gain: int = 0
    """Evaluations since the best one."""
    tenths: int = 0
    """Tenths of the run that were over when evaluating was last considered."""
    loss_sum: float = 0.0
    """Σ −log p(y_t | x, y_<t) over the supervised tokens so far, each by the weights of its step."""
    first_loss: float | None = None
    """Per supervised token, of the first step."""
    last_loss: float | None = None
    """Per supervised token, of the steps between the last two lines of the log: one step's alone says little."""
    stopped: Literal["", "early", "minutes", "interrupted", "behind", "failed"] = ""


class Loop:
    """All that changes while a run goes on, `flat`'s parameters included.

    Its plan and `state`, `logged`, `losses`, `best`, `last_evaluation`, the parameters, the optimizer's and the scaler's state
    decide every step to come. Batches and random numbers follow from the seed and `state.step`.
    """

    def __init__(self, plan: LoopPlan, state: LoopState, flat: Flat) -> None:
        base = next(plan.model.parameters())
        self.plan = plan
        self.state = state
        self.flat = flat
        self.optimizer = optim.make(flat, plan.config)
        # float16 alone has too few exponents for gradients; elsewhere the scaler does nothing
        self.scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
        self.trainable: list[nn.Parameter] = [*flat.parameters("A"), *flat.parameters("B")]
        self.losses = torch.zeros((), device=base.device)
        """Σ loss over the predictions since the last line of the log, fp32 scalar on the model's device."""
        self.logged = replace(state)
        """The state at the last line of the log."""
        self.best: list[Tensor] | None = None
        """With `patience`, `trainable` at the best evaluation."""
        self.last_evaluation = 0.0
        """Seconds that it took."""
        self.watched: Watched | None = None
        """Loss and gradient norm of the last step, where they are checked a step late."""
        self.check_late = base.device.type == "cuda" if plan.check_late is None else plan.check_late
        self.devices = devices_of(plan.model)
        self.began = plan.clock() - state.seconds

    @property
    def goes_on(self) -> bool:
        """True until the last step is taken or something stopped the loop."""
        return self.state.step < self.plan.total_steps and not self.state.stopped


class Taken(NamedTuple):
    """An optimizer step that was taken."""

    lr: float
    grad_norm: Tensor
    """Before clipping, scalar on the model's device."""


def run_loop(plan: LoopPlan, state: LoopState | None = None) -> LoopState:
    """Train to the end, the clock, an early stop or an interruption, and return `state`, which follows the loop meanwhile.

    Raises TrainError when a loss is not finite.
    """
    state = LoopState() if state is None else state
    with opened(plan, state) as loop:
        while loop.goes_on:
            step(loop)
    return state


@contextlib.contextmanager
def opened(plan: LoopPlan, state: LoopState) -> Iterator[Loop]:
    """Yield a loop whose steps can be taken. On leaving, the adapter holds what was learned.

    Raises TrainError when a loss is not finite.
    """
    longest = max(e.length for e in (*plan.examples, *plan.valid))
    with short_row_attention(plan.model, longest), _flat(plan) as flat:
        loop = Loop(plan, state, flat)
        to_train(plan.model)
        _warn_of_idle_settings(loop)
        if plan.config.gradient_checkpointing:
            _checkpoint_activations(plan.model)
        if plan.valid:
            evaluate(loop)
        try:
            yield loop
            if loop.watched is not None:
                loop.watched.check(loop.scaler)
        finally:
            _restore_best(loop)
            plan.model.eval()


def _flat(plan: LoopPlan) -> Flat:
    """Return the adapter in flat buffers. A forward pass over one record shows which layers read the same tensor."""
    model = plan.model
    of_adapter = updates(model, plan.adapter)
    plain = {n: plain for n, u in of_adapter.items() if (plain := u.plain) is not None}
    one = plan.loss.collate(plan.examples[:1])
    with evaluating(model), torch.no_grad():
        plan.loss(one)  # the first call tries the ways to the loss, which would count as calls of the layers
        groups = same_input(plain, lambda: plan.loss(one))
    layers = {name: owner_of(model).get_submodule(name) for name in plain}
    return Flat(layers, plain, groups, {n: u for n, u in of_adapter.items() if n not in plain})


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

    So dropout's masks do not depend on what is drawn between two steps.
    """
    numbers = [number for loop in loops for number in (loop.plan.config.seed, loop.state.step)]
    return seeded(mixed("step", *numbers), loops[0].devices)


def take_step(loop: Loop) -> Taken:
    """Take a step over a batch of records, whose loss is divided by all its supervised tokens.

    On a GPU nothing here waits for it: losses are added up there, and whether they are finite is read a step late.
    """
    plan = loop.plan
    rows = plan.drawn(loop.state.step)
    batches = [plan.loss.collate(part) for part in plan.parts(rows)]
    supervised = sum(batch.targets for batch in batches)
    loss = sum((_backward(loop, batch, supervised) for batch in batches), start=torch.zeros_like(loop.losses))
    return learn(loop, rows, loss, supervised)


def _backward(loop: Loop, batch: Any, supervised: int) -> Tensor:
    """Add a batch's gradients; return its share of the step's mean loss, fp32 scalar."""
    total, _ = loop.plan.loss(batch)
    mean = total / supervised
    if not mean.requires_grad:
        _refuse_untrained([*updates(loop.plan.model, loop.plan.adapter)])
    torch.autograd.backward(loop.scaler.scale(mean))
    loop.flat.add_gradients()
    return mean.detach()


def learn(loop: Loop, rows: Sequence[Any], loss: Tensor, supervised: int) -> Taken:
    """Take the optimizer's step with the gradients that are there.

    They are of `loss`, the mean over the `supervised` predictions of the examples `rows`.
    """
    config, state = loop.plan.config, loop.state
    lr = config.lr * lr_factor(config, state.step, loop.plan.total_steps, state.seconds)
    optim.set_lr(loop.optimizer, lr)
    if state.step == 0:
        _check_reached(loop)
    loop.scaler.unscale_(loop.optimizer)
    norm = nn.utils.clip_grad_norm_(loop.trainable, config.clip or math.inf)
    _check_finite(loop, Watched(state.step, loss, norm, lr))
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    loop.flat.zero_gradients()
    loop.flat.refresh()
    loop.losses += loss * supervised
    state.step += 1
    state.records += len(rows)
    state.tokens += sum(e.length for e in rows)
    state.supervised += supervised
    return Taken(lr, norm)


def after_step(loop: Loop, taken: Taken, seconds: float) -> None:
    """Do what is due after a step that took so many seconds."""
    plan, state = loop.plan, loop.state
    state.seconds = plan.clock() - loop.began
    state.step_seconds += seconds
    if state.step % plan.config.log_every == 0 or state.step in (1, plan.total_steps):
        _log(loop, taken)
    if plan.config.minutes and state.seconds >= plan.config.minutes * 60:
        state.stopped = "minutes"
    if plan.should_stop():
        state.stopped = "interrupted"
    if plan.valid:
        due = should_evaluate(plan, state, loop.last_evaluation)
        state.tenths = _tenths(plan, state)
        if due and state.stopped != "interrupted":
            evaluate(loop)
    if state.stopped and loop.logged.step < state.step:
        _log(loop, taken)


def _log(loop: Loop, taken: Taken) -> None:
    """Tell a line of the log. On a GPU this waits for it."""
    state = loop.state
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
        loss=(state.loss_sum - before.loss_sum) / (state.supervised - before.supervised),
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


def seconds_left(plan: LoopPlan, state: LoopState) -> float:
    """Return the seconds to the end, by the steps to come or by the clock, whichever ends first."""
    left = state.step_seconds / state.step * (plan.total_steps - state.step)
    minutes = plan.config.minutes
    return min(left, max(0.0, minutes * 60 - state.seconds)) if minutes else left


# --- evaluation -------------------------------------------------------------------------------------------------


def should_evaluate(plan: LoopPlan, state: LoopState, last_evaluation: float) -> bool:
    """Return whether held-out records are due: every `eval_every` steps, or at each tenth of the run; and at its end.

    With `minutes`, a tenth is skipped where evaluations would take too much of the time. `last_evaluation`: seconds of the last
    one.
    """
    if _is_last(plan, state):
        return True
    if plan.config.eval_every:
        return state.step % plan.config.eval_every == 0
    if _tenths(plan, state) == state.tenths:
        return False
    return not plan.config.minutes or state.eval_seconds + last_evaluation <= _EVALUATING * state.seconds


def _is_last(plan: LoopPlan, state: LoopState) -> bool:
    """Return whether no step follows."""
    return state.step == plan.total_steps or bool(state.stopped)


def _tenths(plan: LoopPlan, state: LoopState) -> int:
    """Return the tenths of the run that are over; as before where they decide nothing."""
    if _is_last(plan, state) or plan.config.eval_every:
        return state.tenths
    share = progress(plan.config, state.step, plan.total_steps, state.seconds)
    return int(10 * share + 1e-9)  # 1e-9: a tenth by rounding is a tenth


def evaluate(loop: Loop) -> None:
    """Take the held-out loss; with `patience` keep the best adapter or stop; warn when nothing was learned.

    Raises TrainError for a loss that is not finite, unless there is a best adapter to go back to.
    """
    plan, state, began = loop.plan, loop.state, loop.plan.clock()
    loss = held_out_loss(plan.loss, plan.valid, batch=max(plan.config.batch, _EVALUATED_TOGETHER))
    state.valid_loss = loss
    if not math.isfinite(loss) and loop.best is None:
        raise _not_finite(f"The loss on held-out records is {loss} after step {state.step}", plan.config.lr)
    ended = plan.clock()
    loop.last_evaluation, state.seconds = ended - began, ended - loop.began
    state.eval_seconds += loop.last_evaluation
    if loss < state.best_loss:
        state.best_loss, state.best_step, state.without_gain = loss, state.step, 0
        if plan.config.patience:
            loop.best = [p.detach().clone() for p in loop.trainable]
    else:
        state.without_gain += 1
        if plan.config.patience and state.without_gain >= plan.config.patience:
            state.stopped = "early"
    plan.on_event(Evaluated(state.step, loss, state.best_loss))
    if state.step >= _AFTER_STEPS and relative_norm(plan.model, plan.adapter) < _NOTHING_LEARNED:
        _warn(
            loop,
            f"‖ΔW‖/‖W0‖ is still below {_NOTHING_LEARNED:g} after {state.step} steps: nothing is learned. "
            f"Is lr = {plan.config.lr:g} ten times too small?",
        )


@torch.no_grad()
def held_out_loss(loss: Loss, examples: Sequence[Any], *, batch: int) -> float:
    """Return the mean loss of a prediction over `examples`; of a causal model −log p per supervised token."""
    ordered = sorted(examples, key=lambda e: e.length)
    with evaluating(loss.model):
        pairs = [loss(loss.collate(ordered[i : i + batch])) for i in range(0, len(ordered), batch)]
    return float(sum(total for total, _ in pairs)) / sum(count for _, count in pairs)


def _restore_best(loop: Loop) -> None:
    """Give the adapter the values of the best evaluation, where they were kept."""
    if loop.best is not None:
        with torch.no_grad():
            for parameter, best in zip(loop.trainable, loop.best, strict=True):
                parameter.copy_(best)


# --- checks and warnings ----------------------------------------------------------------------------------------


class Watched:
    """Loss and gradient norm of a step, which are to be finite. From a GPU they are copied without waiting for it."""

    def __init__(self, step: int, loss: Tensor, norm: Tensor, lr: float) -> None:
        self.step, self.lr = step, lr
        self.pair = torch.stack([loss.float(), norm.float()])
        """[2] on the model's device"""
        self.copied = None
        self.here = self.pair
        """[2] on the CPU, once `copied`"""
        if self.pair.is_cuda:
            self.here = torch.empty(2, pin_memory=True).copy_(self.pair, non_blocking=True)
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record()

    def check(self, scaler: torch.amp.GradScaler) -> None:
        """Raise TrainError unless both are finite."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm = self.here.tolist()
        # A gradient that only the scaler pushed out of float16 is no error: it skips that step and scales less from there on
        overflow = scaler.is_enabled() and scaler.get_scale() > 1.0
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            raise _not_finite(f"The loss is {loss} and the gradient norm {norm} at step {self.step + 1}", self.lr)


def _check_finite(loop: Loop, now: Watched) -> None:
    """Raise TrainError before a bad step is taken.

    A loop that checks late looks at the step before, long computed, and takes a bad step without gradients.
    """
    if loop.check_late:
        bad = ~torch.isfinite(now.pair.sum())
        for parameter in loop.trainable:
            assert parameter.grad is not None
            parameter.grad.masked_fill_(bad, 0.0)
        now, loop.watched = loop.watched or now, now
    now.check(loop.scaler)


def _not_finite(what: str, lr: float) -> TrainError:
    return TrainError(
        f"{what}: training cannot go on.\n"
        f"Try a smaller --lr (it was {lr:.3g}) or --dtype float32. What was learned before this step is kept."
    )


def _check_reached(loop: Loop) -> None:
    """Warn of layers that the first step did not reach: their updates would be saved untrained and silently useless.

    Raises TrainError where it reached none.
    """
    unreached = loop.flat.unreached()
    if len(unreached) == len(updates(loop.plan.model, loop.plan.adapter)):
        _refuse_untrained(unreached)
    if unreached:
        _warn(
            loop,
            f"{len(unreached)} adapted layers took no part in the first step and will not learn from such data: "
            f"{shown(unreached, 5)}.",
        )


def _refuse_untrained(layers: list[str]) -> NoReturn:
    raise TrainError(
        f"No adapted layer took part in the first step ({shown(layers, 5)}): this data trains none of them. Choose "
        "targets that the model's forward pass calls with it."
    )


def _warn_of_idle_settings(loop: Loop) -> None:
    """Warn of settings that can have no effect on this adapter and these records."""
    config, total = loop.plan.config, loop.plan.total_steps
    idle = []
    if config.lr_ratio != 1.0 and not loop.flat.parameters("B"):
        idle.append(f"lr_ratio is {config.lr_ratio:g}, and the adapter has no B")
    for name in ("patience", "eval_every"):
        if getattr(config, name) and not loop.plan.valid:
            idle.append(f"{name} is {getattr(config, name)}, and there are no held-out records")
    if 1 < total <= config.warmup and not config.minutes:
        idle.append(f"lr is never reached, the warm-up takes {config.warmup:g} of {total} steps")
    for line in idle:
        _warn(loop, f"A setting has no effect: {line}.")


def _warn(loop: Loop, text: str) -> None:
    loop.plan.on_event(Warned(loop.state.step, text))


# --- the model and the process ----------------------------------------------------------------------------------


def _checkpoint_activations(model: nn.Module) -> None:
    """Compute activations again in the backward pass. transformers names the call anew from version 5 on."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": False})
            return
    raise TrainError(
        f"A {type(model).__name__} has no way to compute activations again. Train it without --gradient-checkpointing."
    )


def relative_norm(model: nn.Module, name: str | None = None) -> float:
    """Return ‖ΔW‖/‖W0‖ over all of the adapter's layers together, without forming any ΔW."""
    owner = owner_of(model)
    moved = [update.moved(owner.get_submodule(layer)) for layer, update in updates(model, name).items()]
    dw, w0 = sum(dw for dw, _ in moved), sum(w0 for _, w0 in moved)
    return (dw / w0) ** 0.5 if w0 else (math.inf if dw else 0.0)


def peak_memory() -> int:
    """Return the most bytes that this process has held so far, on the GPU where one is in use."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # psutil has a peak on Windows alone

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
