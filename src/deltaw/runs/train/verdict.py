"""Warn at the end of a run where nothing was learned, or too much by heart. Knows held-out losses; prints nothing."""

from __future__ import annotations

from collections.abc import Sequence

from deltaw.methods.registry import usual_lr
from deltaw.model.inputs import hidden_size_of
from deltaw.runs.train.job import Job
from deltaw.training.events import Evaluated, Event
from deltaw.training.loop import LoopState
from deltaw.training.tasks import Task, task_of

# The least share of the trivial answer's loss that learning must take away. Of texts a margin in nats decides (`least_margin`):
# a model that was trained on similar data has little to learn
_LEAST_GAIN = 0.05
# The share by which a final held-out loss of texts may exceed the lowest one
_BY_HEART = 0.02
# Fewer steps teach little at any usual rate
_FEW_STEPS = 100
_PAGE = "docs/when_nothing_is_learned.md"


def verdict(job: Job, events: Sequence[Event], state: LoopState) -> list[str]:
    """Return warnings about what the run came to by its held-out loss; none where nothing was held out or it ended early."""
    losses = [event for event in events if isinstance(event, Evaluated)]
    if len(losses) < 2 or state.stopped not in ("", "early", "minutes"):
        return []
    config, task = job.prepared.config, task_of(job.prepared.config.data)
    best = min(losses, key=lambda event: event.valid_loss)
    final = best if config.patience else losses[-1]
    return [*_nothing_learned(job, losses[0], final, state), *_by_heart(task, best, final, state)]


def _nothing_learned(job: Job, first: Evaluated, final: Evaluated, state: LoopState) -> list[str]:
    """Compare the final loss with the trivial answer's; for texts with the base's, which the first evaluation measured."""
    prepared = job.prepared
    task, valid = task_of(prepared.config.data), prepared.valid
    if prepared.config.start is not None or valid is None:
        return []
    trivial = task.trivial_loss(prepared.encoded.examples, valid.examples)
    if trivial is None:
        before, known = first.valid_loss, "before training it was"
        least = task.least_margin
    else:
        before, known = trivial, f"{task.trivial} has"
        least = _LEAST_GAIN * trivial
    if before - final.valid_loss >= least:
        return []
    loss = f"{final.valid_loss:.4g} {task.unit} on {len(valid.examples)} held-out records, and {known} {before:.4g}"
    return [f"Nothing was learned: the loss is {loss}. {_advice(job, final.valid_loss > before, state)} See {_PAGE}."]


def _advice(job: Job, is_worse: bool, state: LoopState) -> str:
    """Return what to try next."""
    config = job.prepared.config
    usual = usual_lr(job.prepared.method, hidden_size_of(getattr(job.model, "config", None)))
    lr = config.peak_lr
    if lr < usual / 2:
        return f"Try --lr {usual:g}, the usual rate: it was {lr:g}."
    if state.step < _FEW_STEPS:
        more = (
            f"--steps {3 * config.steps}" if config.steps else f"--epochs {max(2, round((config.epochs or 1) * 3)):g}"
        )
        return f"The run had {state.step} steps only: try {more}."
    if lr > 2 * usual:
        return f"Try the usual rate, --lr {usual:g}: it was {lr:g}."
    lower = f", or a lower rate, --lr {lr / 3:.1g}" if is_worse else ""
    return f"Look at the records (deltaw data DATA --model MODEL), then try more of them{lower}, or a larger model."


def _by_heart(task: Task, best: Evaluated, final: Evaluated, state: LoopState) -> list[str]:
    """Warn of texts whose held-out loss rose. The loss of classes rises where a model grows surer, though its answers improve."""
    if task.answers != "text" or final.valid_loss - best.valid_loss < max(
        task.least_margin, _BY_HEART * best.valid_loss
    ):
        return []
    if best.step == 0:
        return []
    return [
        f"The held-out loss was lowest after step {best.step} of {state.step} ({best.valid_loss:.4g}), and ended at "
        f"{final.valid_loss:.4g}: after it the records were learned by heart. Take fewer --epochs, or --patience 2, which keeps "
        "the best adapter."
    ]
