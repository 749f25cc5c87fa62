"""`deltaw plan`: what training would take, a line for each method."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from deltaw import units
from deltaw.cli import show
from deltaw.cli.flags import Plan

SIZES = ("method", "trained", "share", "adapter", "with optimizer", "FLOPs/token")
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "working")


def run(command: Plan) -> None:
    show.quiet_libraries()
    from deltaw.planning import plan

    with show.err.status("planning …"):
        found = plan(command.model, command.plan)
    if command.json:
        print(json.dumps(_plain(found), indent=1, ensure_ascii=False))
        return
    settings = command.plan
    show.out.print(
        f"\n{found.model}: {found.base_parameters:,} parameters, {units.size(found.base_bytes)} in {found.dtype}; "
        f"{found.task}, batches of {settings.batch} × {settings.length} tokens, {settings.optimizer}, on {found.device}.",
        soft_wrap=True,
    )
    show.out.print(_sizes(found))
    show.out.print(_memory(found, settings))
    if found.device == "cpu" and found.rows:
        process = units.size(found.rows[0].memory.process)
        show.out.print(f"Peaks include the process by itself, {process}.", style="dim", soft_wrap=True)
    for row in found.rows:
        for note in _notes(row):
            show.out.print(f"{row.name}: {note}", style="dim", soft_wrap=True)
    for name, why in found.failed.items():
        show.out.print(f"{name} does not fit: {why}", style="yellow", soft_wrap=True)


def _sizes(found: Any) -> Any:
    made = show.table(*SIZES)
    for row in found.rows:
        flops = "–" if row.flops_per_token is None else f"{row.flops_per_token:.3g}"
        made.add_row(
            row.name, f"{row.parameters:,}", f"{row.share:.3%}", units.size(row.adapter_bytes),
            units.size(row.bytes_with_optimizer), flops,
        )  # fmt: skip
    return made


def _memory(found: Any, settings: Any) -> Any:
    """Parts, then what activations are without and with checkpointing, the peak, and the largest batch."""
    largest = [] if settings.memory is None else [f"rows in {settings.memory}"]
    made = show.table("method", *PARTS, "kept", "checkpointed", "logits", "peak", *largest, title="\nTraining memory")
    for row in found.rows:
        m, again = row.memory, row.kept_checkpointed
        more = [str(row.largest_batch)] if largest else []
        made.add_row(
            row.name, *(units.size(getattr(m, part)) for part in PARTS), units.size(row.kept),
            "–" if again is None else units.size(again), units.size(m.logits), units.size(m.total), *more,
        )  # fmt: skip
    return made


def _notes(row: Any) -> list[str]:
    rough = "the model does not run without its weights, so its activations are an estimate by its sizes."
    return [*([row.note] if row.note else []), *([rough] if row.memory.estimated else [])]


def _plain(found: Any) -> dict[str, Any]:
    plain = dataclasses.asdict(found)
    for values, row in zip(plain["rows"], found.rows, strict=True):
        values["memory"]["total"] = row.memory.total
    return plain
