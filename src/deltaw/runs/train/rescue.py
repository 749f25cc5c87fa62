"""Rescue of the last good values of an adapter whose run met a loss, a gradient or a weight that is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from deltaw.errors import DeltaWError, NotFinite
from deltaw.layers.processes.ranks import ALONE
from deltaw.layers.tree import evaluating, not_finite_in
from deltaw.model.switch import base_not_finite, using
from deltaw.runs.train.job import Job, save, values_are_finite
from deltaw.training.keeper import read_states
from deltaw.training.loop import LoopPlan, LoopState, opened


def with_what_was_good(job: Job, plan: LoopPlan, error: NotFinite) -> DeltaWError:
    """Save the last values of the adapter with which the bad step's records have a finite loss, if there are any.

    Returns the error, with what was saved; one of the base, where that is damaged or gives no finite loss from the first step on.
    """
    rows, folder = plan.drawn(error.step), job.folder.adapter
    base_is_sound = _gives_finite_loss(job, plan, rows, None)
    if not base_is_sound and (error.step == 0 or not_finite_in(job.model)):
        return base_not_finite(job.model, job.prepared.loaded.name)
    step: int | None = error.step if values_are_finite(job) else None
    if base_is_sound:
        step = _last_good(job, plan, rows, error.step)
    if step is None:
        return NotFinite(f"{error}\nNo adapter was saved: none of its values so far are good.", step=error.step)
    save(job, step)
    with_base = "" if base_is_sound else " The base alone gives no finite loss with these records either: look at them."
    return NotFinite(
        f"{error}{with_base}\nThe adapter after step {step}, the last good one, is in {folder}.", step=error.step
    )


def _last_good(job: Job, plan: LoopPlan, rows: Sequence[Any], step: int) -> int | None:
    """Give the adapter the last values, its own or a saved state's, with which these records have a finite loss.

    Returns the steps after which it had them; None where there are none.
    """
    if _gives_finite_loss(job, plan, rows, job.adapter):
        return step
    for kept in read_states(job.folder.path):
        with opened(replace(plan, valid=(), on_event=lambda event: None, ranks=ALONE), LoopState(), kept.saved):
            pass  # on leaving, the adapter holds the state's values
        if kept.saved.step and _gives_finite_loss(job, plan, rows, job.adapter):
            return kept.saved.step
    return None


def _gives_finite_loss(job: Job, plan: LoopPlan, rows: Sequence[Any], adapter: str | None) -> bool:
    """Return whether the records' loss is finite, with the adapter or the base alone."""
    if adapter is not None and not values_are_finite(job):
        return False
    with using(job.model, adapter), torch.no_grad(), evaluating(job.model):
        return all(bool(plan.loss(plan.loss.collate(part))[0].isfinite()) for part in plan.parts(rows))
