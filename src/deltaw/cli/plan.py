"""`deltaw plan`: what training would take, a line for each method."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from deltaw.cli import show
from deltaw.cli.flags import Plan
from deltaw.files import units

SIZES = ("method", "trained", "share", "adapter", "with optimizer")
PARTS = ("process", "weights", "adapter", "gradients", "optimizer", "activations", "working", "heap")


def run(command: Plan) -> None:
    show.quiet_libraries()
    from deltaw.runs.memory.plan import plan

    with show.err.status("planning …"):
        found = plan(command.model, command.plan)
    if command.json:
        print(json.dumps(_plain(found), indent=1, ensure_ascii=False))
        return
    settings = command.plan
    rows = "images" if found.length is None else f"× {found.length} tokens"
    show.out.print(
        f"\n{found.model}: {found.base_parameters:,} parameters, {units.size(found.base_bytes)} in {found.dtype}; "
        f"{found.task}, batches of {settings.batch} {rows}, {settings.optimizer}, on {found.device}.",
        soft_wrap=True,
    )
    show.out.print(_sizes(found))
    show.out.print("\nTraining memory", style="bold")
    show.out.print(_memory(found.rows, settings))
    for text, names in _coverages(found).items():
        show.prose(f"{', '.join(names)}: {text}", style="dim")
    for row in found.rows:
        for note in _notes(row):
            show.prose(f"{row.name}: {note}", style="dim")
    for name, why in found.failed.items():
        show.prose(f"{name} does not fit: {why}", style="yellow")


def _sizes(found: Any) -> Any:
    made = show.table(*SIZES, "FLOPs/image" if found.length is None else "FLOPs/token")
    for row in found.rows:
        flops = "–" if row.flops_per_token is None else f"{row.flops_per_token:.3g}"
        made.add_row(
            row.name, f"{row.parameters:,}", f"{row.share:.3%}", units.size(row.adapter_bytes),
            units.size(row.bytes_with_optimizer), flops,
        )  # fmt: skip
    return made


def _memory(rows: Sequence[Any], settings: Any) -> Any:
    """A column for each method: the parts, the peak that they add up to, and what else there is to know of it."""
    made = show.table("", *(row.name for row in rows))
    for part in PARTS:
        if part not in ("process", "heap") or any(row.memory.process for row in rows):
            made.add_row(part, *(units.size(getattr(row.memory, part)) for row in rows))
    made.add_row("peak", *(units.size(row.memory.total) for row in rows), style="bold")
    if settings.gradient_checkpointing:
        made.add_row("activations, otherwise", *(units.size(row.kept) for row in rows), style="dim")
    else:
        again = ("–" if row.kept_checkpointed is None else units.size(row.kept_checkpointed) for row in rows)
        made.add_row("activations, checkpointed", *again, style="dim")
    made.add_row("logits, when at work", *(units.size(row.memory.logits) for row in rows), style="dim")
    if settings.memory is not None:
        made.add_row(f"rows in {settings.memory}", *(str(row.largest_batch) for row in rows))
    return made


def _coverages(found: Any) -> dict[str, list[str]]:
    """Map each sentence on the layers to the methods that it is true of."""
    methods: dict[str, list[str]] = {}
    for row in found.rows:
        if row.coverage:
            methods.setdefault(" ".join(row.coverage), []).append(row.name)
    return methods


def _notes(row: Any) -> list[str]:
    rough = "the model does not run without its weights, so its activations are an estimate by its sizes."
    return [*([row.note] if row.note else []), *([rough] if row.memory.estimated else [])]


def _plain(found: Any) -> dict[str, Any]:
    plain = dataclasses.asdict(found)
    for values, row in zip(plain["rows"], found.rows, strict=True):
        values["memory"]["total"] = row.memory.total
    return plain
