"""Figures of records that begin alike, told before the first step."""

from __future__ import annotations

from deltaw.data import Order
from deltaw.data.groups import Alike
from deltaw.data.trees import count_of
from deltaw.training.loop.plan import LoopPlan
from deltaw.training.losses import CompletionLoss

_STEPS = 20
"""Steps that are looked at, the run's first."""


def alike(plan: LoopPlan) -> Alike | None:
    """Return how much a run's records begin with alike; None of tasks that share nothing, and where that is turned off."""
    if plan.config.share == "off" or not isinstance(plan.loss, CompletionLoss):
        return None
    grouped = plan.config.share == "group"
    computed, a_step, records = _of_first_steps(plan, plan.order)
    if_grouped = computed if grouped else _of_first_steps(plan, plan.order_of(grouped=True))[0]
    return Alike(len(plan.groups), a_step, records, computed, if_grouped, grouped)


def _of_first_steps(plan: LoopPlan, order: Order) -> tuple[float, float, float]:
    """Return the share of the tokens that trees have, and a step's groups and records."""
    group_of = {i: number for number, members in enumerate(plan.groups) for i in members}
    steps = min(_STEPS, plan.total_steps)
    tokens = kept = groups = records = 0
    for step in range(steps):
        indices = order.at(step)
        groups += len({group_of[i] for i in indices})
        records += len(indices)
        for part in plan.parts(plan.ranks.part(indices)):
            rows = [plan.examples[i].input_ids for i in part]
            tokens += sum(map(len, rows))
            kept += count_of(rows)
    return kept / tokens, groups / steps, records / steps
