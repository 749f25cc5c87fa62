"""The training loop: batches → loss → step, with evaluation, early stop and a clean way to be interrupted.

All that changes while it runs is in one place, `LoopState`, beside the optimizer and the adapter's tensors.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.config import TrainConfig
from deltaw.data import Order
from deltaw.errors import TrainError
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
# Where the time is set, the share of it so far that evaluations may come to for one more to be made before the end
_EVALUATING = 0.2


@dataclass
class LoopState:
    """Where the loop is. Counts are over the whole run."""

    step: int = 0
    seconds: float = 0.0
    """Since the start, evaluation included."""
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
    tenths: int = 0
    """Of the run, at the last look at whether to evaluate."""
    loss_sum: float = 0.0
    """Σ −log p(y_t | x, y_<t) over the supervised tokens so far, each by the weights of its step."""
    first_loss: float | None = None
    """Per supervised token, of the first step."""
    last_loss: float | None = None
    """Per supervised token, of the steps between the last two lines of the log: one step's alone says little."""
    stopped: Literal["", "early", "minutes", "interrupted", "behind", "failed"] = ""


@dataclass
class Loop:
    """One adapter trained on encoded examples. The loss's model carries it, attached and active."""

    loss: Loss
    examples: Sequence[Any]
    """What `loss.collate` takes; each has a `length`."""
    valid: Sequence[Any]
    config: TrainConfig
    on_event: Callable[[Event], None] = lambda event: None
    should_stop: Callable[[], bool] = lambda: False
    adapter: str = "default"
    state: LoopState = field(default_factory=LoopState, init=False)

    def __post_init__(self) -> None:
        config, self.model = self.config, self.loss.model
        base = next(self.model.parameters())
        self.on_cuda = base.device.type == "cuda"
        # float16 alone has too few exponents for gradients; elsewhere the scaler does nothing
        self.scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
        lengths = [e.length for e in self.examples]
        self.order = Order(lengths, batch=config.batch, seed=config.seed, tokens=config.batch_tokens)
        self.total_steps = config.steps or self.order.steps(config.epochs)
        self.best: list[Tensor] | None = None
        self.losses = torch.zeros((), device=base.device)  # since they were last read
        self.last: _Watched | None = None
        self.last_evaluation = 0.0  # its seconds
        self.devices = devices_of(self.model)
        self._logged = replace(self.state)

    def run(self) -> LoopState:
        """Train to the end, the clock, an early stop or an interruption. Raises TrainError when a loss is not finite."""
        with self.opened():
            while self.goes_on:
                self.step()
        return self.state

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """While open, steps may be taken; on leaving, the adapter is what was learned."""
        longest = max(e.length for e in (*self.examples, *self.valid))
        with short_row_attention(self.model, longest), self._flat() as self.flat:
            self.optimizer = optim.make(self.flat, self.config)
            self.trainable = [*self.flat.parameters("A"), *self.flat.parameters("B")]
            self.began = time.monotonic()
            to_train(self.model)
            self._warn_of_idle_settings()
            if self.config.gradient_checkpointing:
                _checkpoint_activations(self.model)
            if self.valid:
                self.evaluate()
            try:
                yield
                if self.last is not None:
                    self.last.check(self.scaler)
            finally:
                self._keep_best()
                self.model.eval()

    def _flat(self) -> Flat:
        """A and B in flat buffers, and the layers that read the same tensor found by a forward pass over one record."""
        every = updates(self.model, self.adapter)
        plain = {n: plain for n, u in every.items() if (plain := u.plain) is not None}
        one = self.loss.collate(self.examples[:1])
        with evaluating(self.model), torch.no_grad():
            self.loss(one)  # its first call, which tries the ways to the loss
            groups = same_input(plain, lambda: self.loss(one))
        layers = {name: owner_of(self.model).get_submodule(name) for name in plain}
        return Flat(layers, plain, groups, {n: u for n, u in every.items() if n not in plain})

    @property
    def goes_on(self) -> bool:
        return self.state.step < self.total_steps and not self.state.stopped

    def step(self) -> None:
        """One optimizer step, and what is due after it: a line of the log, an evaluation, a stop."""
        began = time.monotonic()
        with self.drawing():
            values = self._step()
        self.ended(values, time.monotonic() - began)

    def drawing(self, *others: Loop) -> contextlib.AbstractContextManager[None]:
        """While open, random numbers (dropout's) follow from the seed and the number of the step alone, of this loop and of those
        that share its pass: whatever is drawn between two steps changes nothing."""
        numbers = [number for loop in (self, *others) for number in (loop.config.seed, loop.state.step)]
        return seeded(mixed("step", *numbers), self.devices)

    def ended(self, values: dict[str, Any], seconds: float) -> None:
        """What is due after a step, which took so long and came to `values`."""
        self.state.seconds = time.monotonic() - self.began
        self.state.step_seconds += seconds
        if self.state.step % self.config.log_every == 0 or self.state.step in (1, self.total_steps):
            self._log(values)
        if self.config.minutes and self.state.seconds >= self.config.minutes * 60:
            self.state.stopped = "minutes"
        if self.should_stop():
            self.state.stopped = "interrupted"
        if self.valid and self._is_time_to_evaluate() and self.state.stopped != "interrupted":
            self.evaluate()
        if self.state.stopped and self._logged.step < self.state.step:
            self._log(values)

    def _step(self) -> dict[str, Any]:
        """A batch of records, its loss divided by all its supervised tokens.

        On a GPU nothing here waits for it: losses are added up there, and whether they are finite is read a step late.
        """
        rows = self.drawn()
        micro = [self.loss.collate(part) for part in self.parts(rows)]
        supervised = sum(batch.targets for batch in micro)
        loss = sum((self._backward(batch, supervised) for batch in micro), start=torch.zeros_like(self.losses))
        return self.learn(rows, loss, supervised)

    def drawn(self) -> list[Any]:
        """The examples of the step to come."""
        return [self.examples[i] for i in self.order.at(self.state.step)]

    def parts(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        """Those of one step, of one forward pass each."""
        size = self.config.micro_batch or len(rows)
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def learn(self, rows: Sequence[Any], loss: Tensor, supervised: int) -> dict[str, Any]:
        """The optimizer's step, with the gradients that are there: of the mean loss of that many predictions over `rows`."""
        lr = self.config.lr * lr_factor(self.config, self.state.step, self.total_steps, self.state.seconds)
        optim.set_lr(self.optimizer, lr)
        if self.state.step == 0:
            self._check_reached()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trainable, self.config.clip or math.inf)
        self._check_finite(_Watched(self.state.step, loss, norm, lr))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.flat.zero_gradients()
        self.flat.refresh()
        self.losses += loss * supervised
        state = self.state
        state.step += 1
        state.records += len(rows)
        state.tokens += sum(e.length for e in rows)
        state.supervised += supervised
        return {"lr": lr, "grad_norm": norm}

    def _backward(self, batch: Any, supervised: int) -> Tensor:
        total, _ = self.loss(batch)
        mean = total / supervised
        if not mean.requires_grad:
            self._refuse_untrained([*updates(self.model, self.adapter)])
        self.scaler.scale(mean).backward()
        self.flat.add_gradients()
        return mean.detach()

    def _check_finite(self, now: _Watched) -> None:
        """Raise TrainError before a bad step is taken. On a GPU the step before this one is looked at instead, which has long
        been computed, and a bad step is made one without gradients."""
        if self.on_cuda:
            bad = ~torch.isfinite(now.pair.sum())
            for parameter in self.trainable:
                assert parameter.grad is not None
                parameter.grad.masked_fill_(bad, 0.0)
            now, self.last = self.last or now, now
        now.check(self.scaler)

    def _check_reached(self) -> None:
        """A layer whose forward never ran has no gradient: its update would be saved untrained and silently useless. Raises
        TrainError where that is true of all layers."""
        dead = self.flat.unreached()
        if len(dead) == len(updates(self.model, self.adapter)):
            self._refuse_untrained(dead)
        if dead:
            names = ", ".join(dead[:5]) + (" …" if len(dead) > 5 else "")
            self._warn(
                f"{len(dead)} adapted layers took no part in the first step and will not learn from such data: {names}"
            )

    def _warn_of_idle_settings(self) -> None:
        """Say which settings can have no effect on this adapter and these records."""
        idle = []
        if self.config.lr_ratio != 1.0 and not self.flat.parameters("B"):
            idle.append(f"lr_ratio is {self.config.lr_ratio:g}, and the adapter has no B")
        for name in ("patience", "eval_every"):
            if getattr(self.config, name) and not self.valid:
                idle.append(f"{name} is {getattr(self.config, name)}, and there are no held-out records")
        if 1 < self.total_steps <= self.config.warmup and not self.config.minutes:
            idle.append(f"lr is never reached, the warm-up takes {self.config.warmup:g} of {self.total_steps} steps")
        for line in idle:
            self._warn(f"A setting has no effect: {line}.")

    def _refuse_untrained(self, layers: list[str]) -> None:
        raise TrainError(
            f"No adapted layer took part in the first step ({', '.join(layers[:5])}): this data trains none of them. Choose "
            "targets that the model's forward pass calls with it."
        )

    def _is_time_to_evaluate(self) -> bool:
        """Every `eval_every` steps, or at each tenth of the run; and at its end. A tenth goes by where the time is set and too
        much of it would go into evaluations."""
        state = self.state
        if state.step == self.total_steps or state.stopped:
            return True
        if self.config.eval_every:
            return state.step % self.config.eval_every == 0
        done = progress(self.config, state.step, self.total_steps, state.seconds)
        before, state.tenths = state.tenths, int(10 * done + 1e-9)  # 1e-9: a tenth by rounding is a tenth
        if state.tenths == before:
            return False
        return not self.config.minutes or state.eval_seconds + self.last_evaluation <= _EVALUATING * state.seconds

    def evaluate(self) -> None:
        """Held-out loss; remember the best adapter when early stop is on; warn when nothing was learned. Raises TrainError for a
        loss that is not finite, unless there is a best adapter to go back to."""
        state, began = self.state, time.monotonic()
        loss = state.valid_loss = held_out_loss(self.loss, self.valid, batch=max(self.config.batch, 8))
        if not math.isfinite(loss) and self.best is None:
            raise _not_finite(f"The loss on held-out records is {loss} after step {state.step}", self.config.lr)
        ended = time.monotonic()
        self.last_evaluation, state.seconds = ended - began, ended - self.began
        state.eval_seconds += self.last_evaluation
        if loss < state.best_loss:
            state.best_loss, state.best_step, state.without_gain = loss, state.step, 0
            if self.config.patience:
                self.best = [p.detach().clone() for p in self.trainable]
        else:
            state.without_gain += 1
            if self.config.patience and state.without_gain >= self.config.patience:
                state.stopped = "early"
        self.on_event(Evaluated(state.step, loss, state.best_loss))
        if state.step >= _AFTER_STEPS and relative_norm(self.model, self.adapter) < _NOTHING_LEARNED:
            self._warn(
                f"‖ΔW‖/‖W0‖ is still below {_NOTHING_LEARNED:g} after {state.step} steps: nothing is learned. "
                f"Is lr = {self.config.lr:g} ten times too small?"
            )

    def _keep_best(self) -> None:
        if self.best is not None:
            with torch.no_grad():
                for parameter, kept in zip(self.trainable, self.best, strict=True):
                    parameter.copy_(kept)

    def _log(self, values: dict[str, Any]) -> None:
        """A line of the log: loss and speed are of the steps since the last one."""
        state, before = self.state, self._logged
        state.loss_sum += float(self.losses)
        self.losses.zero_()
        state.last_loss = (state.loss_sum - before.loss_sum) / (state.supervised - before.supervised)
        state.first_loss = state.last_loss if state.first_loss is None else state.first_loss
        norm = float(values["grad_norm"])
        speed = (state.tokens - before.tokens) / max(state.step_seconds - before.step_seconds, 1e-9)
        self._logged = replace(state)
        self.on_event(Stepped(
            state.step, state.last_loss, values["lr"], norm if math.isfinite(norm) else None, state.seconds, state.tokens,
            state.supervised, tokens_per_second=speed, memory=peak_memory(), seconds_left=self._seconds_left(),
            total_steps=self.total_steps,
        ))  # fmt: skip

    def _seconds_left(self) -> float:
        """By the steps to come or by the clock, whichever ends first."""
        state = self.state
        left = state.step_seconds / state.step * (self.total_steps - state.step)
        return min(left, max(0.0, self.config.minutes * 60 - state.seconds)) if self.config.minutes else left

    def _warn(self, text: str) -> None:
        self.on_event(Warned(self.state.step, text))


class _Watched:
    """Loss and gradient norm of a step. From a GPU they are copied without waiting for it."""

    def __init__(self, step: int, loss: Tensor, norm: Tensor, lr: float) -> None:
        self.step, self.lr = step, lr
        self.pair = torch.stack([loss.float(), norm.float()])
        self.copied = None
        self.here = self.pair
        if self.pair.is_cuda:
            self.here = torch.empty(2, pin_memory=True).copy_(self.pair, non_blocking=True)
            self.copied = torch.cuda.Event()
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


def _not_finite(what: str, lr: float) -> TrainError:
    return TrainError(
        f"{what}: training cannot go on.\n"
        f"Try a smaller --lr (it was {lr:.3g}) or --dtype float32. What was learned before this step is kept."
    )


def _checkpoint_activations(model: Any) -> None:
    """By its old name up to transformers 5, by its new one from there on."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@torch.no_grad()
def held_out_loss(loss: Loss, examples: Sequence[Any], *, batch: int) -> float:
    """Mean loss of a prediction (of a causal model −log p per supervised token) over `examples`."""
    ordered = sorted(examples, key=lambda e: e.length)
    with evaluating(loss.model):
        pairs = [loss(loss.collate(ordered[i : i + batch])) for i in range(0, len(ordered), batch)]
    return float(sum(total for total, _ in pairs)) / sum(count for _, count in pairs)


def relative_norm(model: nn.Module, name: str | None = None) -> float:
    """‖ΔW‖/‖W0‖ over all of the adapter's layers together, without forming any ΔW."""
    owner = owner_of(model)
    moved = [update.moved(owner.get_submodule(name)) for name, update in updates(model, name).items()]
    dw, w0 = sum(dw for dw, _ in moved), sum(w0 for _, w0 in moved)
    return (dw / w0) ** 0.5 if w0 else (math.inf if dw else 0.0)


def peak_memory() -> int:
    """Bytes: the most that this process has held so far, on the GPU where one is in use."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
