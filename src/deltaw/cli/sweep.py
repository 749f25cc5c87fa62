"""`deltaw sweep`: a line for each candidate as it is done, then the table and what it comes to."""

from __future__ import annotations

import json
from typing import Any

from deltaw.cli import show
from deltaw.cli.flags import Sweep
from deltaw.files import units


def run(command: Sweep) -> None:
    show.quiet_libraries()
    from deltaw.runs.reports.sweep import COLUMNS, cells, metrics_of, note_on_intervals, ordered, sentences
    from deltaw.runs.sweep import sweep

    with show.err.status("getting ready …") as status:
        done = sweep(
            command.model, command.data, command.run, command.sweep,
            on_event=lambda event: _hear(event, status, quiet=command.json),
        )  # fmt: skip
    if command.json:
        print(json.dumps(done.results, indent=1, ensure_ascii=False))
        return
    for warning in done.results["warnings"]:
        show.prose(f"warning: {warning}", style="yellow", console=show.err)
    metrics = metrics_of(done.results)
    made = show.table(*COLUMNS, *metrics, title=f"\n{command.model} on {command.data}")
    for row in ordered(done.results):
        made.add_row(*cells(row, metrics))
    show.out.print(made)
    for sentence in sentences(done.results):
        show.prose(f"\n{sentence}")
    show.prose(note_on_intervals(done.results), style="dim")
    show.facts({"report": str(done.report), "results": str(done.folder / "results.json")})


def _hear(event: Any, status: Any, *, quiet: bool) -> None:
    values = event.values
    if event.kind == "left out":
        if not quiet:
            show.prose(f"{values['targets']} is left out: {values['why']}.", style="yellow")
    elif event.kind == "width":
        each = "one after the other" if values["width"] == 1 else f"{values['width']} in one pass over the base"
        if not quiet:
            show.prose(f"Candidates are trained {each}: {values['why']}.", style="dim")
    elif event.kind == "started":
        status.update(_named(values))
    elif event.kind == "step":
        left = units.duration(values["seconds_left"])
        status.update(f"{_named(values)}: step {values['step']} of {values['total_steps']}, {left} left …")
    elif not quiet:
        again = "" if values["fresh"] else "  (done before)"
        show.out.print(f"{_named(values):<40} {_outcome(values)}{again}", soft_wrap=True)


def _named(values: dict[str, Any]) -> str:
    return f"{values['name']}, lr {values['lr']:g}, seed {values['seed']}"


def _outcome(values: dict[str, Any]) -> str:
    if "error" in values:
        return f"failed: {values['error'].splitlines()[0]}"
    if "behind" in values:
        return f"held-out loss {values['valid_loss']:.4f} at step {values['behind']}, in the worse half: ended"
    return f"held-out loss {values['valid_loss']:.4f} in {units.duration(values['seconds'])}"
