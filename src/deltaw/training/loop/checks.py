"""Checks of a step: values that are not finite, layers that it does not reach, settings without effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from deltaw.data.batches import padded
from deltaw.errors import NotFinite, TrainError, shown
from deltaw.model.summary import updates
from deltaw.training.events import Warned
from deltaw.training.frozen import is_faster
from deltaw.training.loop.spikes import mark

if TYPE_CHECKING:
    from deltaw.training.loop.state import Loop


# Records of a bad step that are named
_NAMED = 8


class Watched:
    """Loss and gradient norm of a step, which are to be finite. From a GPU they are copied without waiting for it.

    places: of the step's records, for messages.
    """

    def __init__(self, step: int, loss: Tensor, norm: Tensor, lr: float, places: Sequence[str] = ()) -> None:
        self.step, self.lr, self.places = step, lr, places
        self.pair = torch.stack([loss.float(), norm.float()])
        """[2] on the model's device"""
        self.copied = None
        self.here = self.pair
        """[2] on the CPU, once `copied`"""
        if self.pair.is_cuda:
            self.here = torch.empty(2, pin_memory=True).copy_(self.pair, non_blocking=True)
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record()

    def is_sound(self, scaler: torch.amp.GradScaler) -> bool:
        """Return whether both are finite. A gradient that only the scaler pushed out of float16 is no error: it skips that step
        and scales less from there on."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm = self.here.tolist()
        overflow = scaler.is_enabled() and scaler.get_scale() > 1.0
        return math.isfinite(loss) and (math.isfinite(norm) or overflow)

    def check(self, scaler: torch.amp.GradScaler, layers: Callable[[], Sequence[str]] = list) -> None:
        """Raise NotFinite unless both are finite. layers: returns those whose gradients are not."""
        if not self.is_sound(scaler):
            raise self.error(layers())

    def error(self, layers: Sequence[str] = ()) -> NotFinite:
        """Return the error of this step, with the layers and the records."""
        loss, norm = self.here.tolist()
        problems = [f"layers whose gradients are not finite: {shown(layers, 5)}"] if layers else []
        problems += [f"records of the step: {shown(self.places, _NAMED)}"] if self.places else []
        return not_finite(
            f"The loss is {loss} and the gradient norm {norm} at step {self.step + 1}", self.lr, self.step, problems
        )


def mask_bad(loop: Loop, now: Watched) -> None:
    """Take a bad step without gradients, on a device that is looked at a step late. Raises NotFinite for the step before."""
    bad = ~torch.isfinite(now.pair.sum())
    for parameter in loop.trainable:
        assert parameter.grad is not None
        parameter.grad.masked_fill_(bad, 0.0)
    before, loop.watched = loop.watched, now
    if before is None:
        now.check(loop.scaler)
    else:
        _look_at(loop, before)


def look_back(loop: Loop) -> None:
    """Look at the last step where that is done a step late. Raises NotFinite."""
    watched, loop.watched = loop.watched, None
    if watched is not None:
        _look_at(loop, watched)


def _look_at(loop: Loop, watched: Watched) -> None:
    watched.check(loop.scaler)
    mark(loop, watched)


def not_finite(what: str, lr: float, step: int, problems: Sequence[str] = ()) -> NotFinite:
    """Return the error for a value that is not finite after so many steps."""
    advice = f"Try a smaller --lr (it was {lr:.3g}) or --dtype float32."
    heading = f"{what}: training cannot go on."
    return NotFinite(heading, problems, advice, step=step)


def check_reached(loop: Loop) -> None:
    """Warn of layers that the first step did not reach: their updates would be saved untrained and silently useless.

    Raises TrainError where it reached none.
    """
    unreached = loop.flat.unreached()
    if len(unreached) == len(updates(loop.plan.model, loop.plan.adapter)):
        refuse_untrained(unreached)
    if unreached:
        warn(
            loop,
            f"{len(unreached)} adapted layers took no part in the first step and will not learn from such data: "
            f"{shown(unreached, 5)}.",
        )


def refuse_untrained(layers: list[str]) -> NoReturn:
    raise TrainError(
        f"No adapted layer took part in the first step ({shown(layers, 5)}): this data trains none of them. Choose "
        "targets that the model's forward pass calls with it."
    )


def warn_of_idle_settings(loop: Loop) -> None:
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
    if config.share == "group" and config.batch == 1 and not config.batch_tokens:
        idle.append("share is group, and a step has one record")
    if config.batch_tokens and (over := sum(padded(e.length) > config.batch_tokens for e in loop.plan.examples)):
        warn(
            loop,
            f"batch_tokens is {config.batch_tokens}, and {over:,} records have more with their padding: each is a "
            "step of its own, of all its tokens.",
        )
    if config.frozen_dtype == "int8" and not loop.flat.int8:
        idle.append(
            "frozen_dtype is int8, and no layer that takes an update by A and B multiplies by a weight as it is"
        )
    for line in idle:
        warn(loop, f"A setting has no effect: {line}.")
    device = next(loop.plan.model.parameters()).device.type
    if config.frozen_dtype == "int8" and device != "meta" and not is_faster(device):
        warn(
            loop, "Products in int8 are slower than full ones on this machine: leave --frozen-dtype out, or take auto."
        )


def warn(loop: Loop, text: str) -> None:
    loop.plan.on_event(Warned(loop.state.step, text))
