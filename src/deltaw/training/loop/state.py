"""All that changes while a run goes on. With its plan it decides every step to come."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.layers.ops.seeding import devices_of
from deltaw.training import optim
from deltaw.training.flat import Flat
from deltaw.training.loop.checks import Watched
from deltaw.training.loop.plan import LoopPlan
from deltaw.training.loop.spikes import Usual


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
    shared: int = 0
    """Tokens of these that were not computed, as another record of the batch has them too."""
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


class Taken(NamedTuple):
    """An optimizer step that was taken."""

    lr: float
    grad_norm: Tensor
    """Before clipping, scalar on the model's device."""


class Loop:
    """All that changes while a run goes on, `flat`'s parameters included.

    saved.py copies what decides every step to come. Batches and random numbers follow from the seed and `state.step`.
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
        self.due = False
        """True while an evaluation is due that a request to stop put off: it comes before the next step."""
        self.rungs = 0
        """Halvings that it has come through (see `run_loops`)."""
        self.failed = ""
        """The error that ended it, of several loops over one model."""
        self.skipped = 0
        """Bad steps that were passed over."""
        self.usual = Usual()
        """The losses of the last steps, to tell spikes from."""
        self.taken: Taken | None = None
        """The last step."""
        self.watched: Watched | None = None
        """Loss and gradient norm of the last step, where they are checked a step late."""
        late = base.device.type == "cuda" if plan.check_late is None else plan.check_late
        self.check_late = late and not plan.config.skip_bad_steps
        self.devices = devices_of(plan.model)
        self.began = plan.clock() - state.seconds

    @property
    def goes_on(self) -> bool:
        """True until the last step is taken or something stopped the loop."""
        return self.state.step < self.plan.total_steps and not self.state.stopped
