"""`deltaw plan`: the cost of training, a line for each method."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Plan
from deltaw.files import units

if TYPE_CHECKING:
    from rich.table import Table

    from deltaw.config import PlanConfig
    from deltaw.runs.memory.plan import Planned, PlannedMethod

SIZES = ("method", "trained", "share", "adapter", "with optimizer")
PARTS = ("process", "weights", "adapter", "gradients", "optimizer", "activations", "working", "heap")


def run(command: Plan) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.runs.memory.plan import plan

    with show.err.status("planning …"):
        planned = plan(command.model, command.plan)
    if command.json:
        print(show.as_json(_plain(planned)))
        return
    settings = command.plan
    rows = "images" if planned.length is None else f"× {planned.length} tokens"
    show.out.print(
        f"\n{planned.model}: {planned.base_parameters:,} parameters, {units.size(planned.base_bytes)} in {planned.dtype}; "
        f"{planned.task}, batches of {settings.batch} {rows}, {settings.optimizer}, on {planned.device}.",
        soft_wrap=True,
    )
    show.out.print(_sizes(planned))
    show.out.print("\nTraining memory", style="bold")
    show.out.print(_memory(planned.rows, settings))
    for text, names in _coverages(planned).items():
        show.prose(f"{', '.join(names)}: {text}", style="dim")
    for row in planned.rows:
        for note in _notes(row):
            show.prose(f"{row.name}: {note}", style="dim")
    for name, why in planned.failed.items():
        show.prose(f"{name} does not fit: {why}", style="yellow")


def _sizes(planned: Planned) -> Table:
    """A row for each method: parameters, bytes, FLOPs."""
    table = show.table(*SIZES, "FLOPs/image" if planned.length is None else "FLOPs/token")
    for row in planned.rows:
        flops = "–" if row.flops_per_token is None else f"{row.flops_per_token:.3g}"
        table.add_row(
            row.name, f"{row.parameters:,}", f"{row.share:.3%}", units.size(row.adapter_bytes),
            units.size(row.bytes_with_optimizer), flops,
        )  # fmt: skip
    return table


def _memory(rows: Sequence[PlannedMethod], settings: PlanConfig) -> Table:
    """A column for each method: the parts, the peak that they add up to, and figures beside these."""
    table = show.table("", *(row.name for row in rows))
    for part in PARTS:
        if part not in ("process", "heap") or any(row.memory.process for row in rows):
            table.add_row(part, *(units.size(getattr(row.memory, part)) for row in rows))
    table.add_row("peak", *(units.size(row.memory.total) for row in rows), style="bold")
    if settings.gradient_checkpointing:
        table.add_row("activations, not checkpointed", *(units.size(row.kept) for row in rows), style="dim")
    else:
        checkpointed = ("–" if row.kept_checkpointed is None else units.size(row.kept_checkpointed) for row in rows)
        table.add_row("activations, checkpointed", *checkpointed, style="dim")
    table.add_row("logits, when at work", *(units.size(row.memory.logits) for row in rows), style="dim")
    if settings.memory is not None:
        table.add_row(f"rows in {settings.memory}", *(str(row.largest_batch) for row in rows))
    return table


def _coverages(planned: Planned) -> dict[str, list[str]]:
    """Sentences on the layers → the methods that they are true of."""
    methods: dict[str, list[str]] = {}
    for row in planned.rows:
        if row.coverage:
            methods.setdefault(" ".join(row.coverage), []).append(row.name)
    return methods


def _notes(row: PlannedMethod) -> list[str]:
    rough = "the model does not run without its weights, so its activations are estimated from its sizes."
    return [*([row.note] if row.note else []), *([rough] if row.memory.estimated else [])]


def _plain(planned: Planned) -> dict[str, object]:
    """The plan as JSON has it, with the totals."""
    rows = [dataclasses.asdict(row) for row in planned.rows]
    for values, row in zip(rows, planned.rows, strict=True):
        values["memory"]["total"] = row.memory.total
    return dataclasses.asdict(planned) | {"rows": rows}
