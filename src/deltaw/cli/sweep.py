"""`deltaw sweep`: a line for each finished candidate, then the table and the recommended rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Sweep
from deltaw.files import units

if TYPE_CHECKING:
    from rich.status import Status

    from deltaw.runs.events import CandidateEvent, CandidateFinished, SweepEvent


def run(command: Sweep) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.runs.reports.sweep import COLUMNS, cells, metrics_of, note_on_intervals, ordered, sentences
    from deltaw.runs.sweep import sweep

    with show.err.status("getting ready …") as status:
        result = sweep(
            command.model, command.data, command.run, command.sweep,
            on_event=lambda event: _hear(event, status, quiet=command.json),
        )  # fmt: skip
    outcome = result.outcome
    if command.json:
        print(show.as_json(outcome.to_json()))
        return
    for warning in outcome.warnings:
        show.prose(f"warning: {warning}", style="yellow", console=show.err)
    metrics = metrics_of(outcome)
    table = show.table(*COLUMNS, *metrics, title=f"\n{command.model} on {command.data}")
    for row in ordered(outcome):
        table.add_row(*cells(row, metrics))
    show.out.print(table)
    for sentence in sentences(outcome):
        show.prose(f"\n{sentence}")
    show.prose(note_on_intervals(outcome), style="dim")
    show.facts({"report": str(result.report), "results": str(result.folder / "results.json")})


def _hear(event: SweepEvent, status: Status, *, quiet: bool) -> None:
    """Show an event. `quiet` shows only the status line."""
    from deltaw.runs.events import CandidateFinished, CandidateStarted, CandidateStepped, LeftOut, RecordsRead

    if isinstance(event, CandidateStarted):
        status.update(_named(event))
    elif isinstance(event, CandidateStepped):
        progress = event.progress
        left = units.duration(progress.seconds_left)
        status.update(f"{_named(event)}: step {progress.step} of {progress.total_steps}, {left} left …")
    elif quiet:
        return
    elif isinstance(event, RecordsRead):
        show.notes(event.notes)
    elif isinstance(event, LeftOut):
        show.prose(f"{event.targets} is left out: {event.why}.", style="yellow")
    elif isinstance(event, CandidateFinished):
        again = "" if event.fresh else "  (done before)"
        show.out.print(f"{_named(event):<40} {_outcome(event)}{again}", soft_wrap=True)
    else:
        how = "one after the other" if event.width == 1 else f"{event.width} in one pass over the base"
        show.prose(f"Candidates are trained {how}: {event.why}.", style="dim")


def _named(event: CandidateEvent) -> str:
    return f"{event.name}, lr {event.lr:g}, seed {event.seed}"


def _outcome(event: CandidateFinished) -> str:
    from deltaw.runs.results.study import Failed
    from deltaw.runs.results.sweep import Behind

    outcome = event.outcome
    if isinstance(outcome, Failed):
        return f"failed: {outcome.error.splitlines()[0]}"
    loss = f"held-out loss {outcome.valid_loss:.4f}"
    if isinstance(outcome, Behind):
        return f"{loss} at step {outcome.step}, in the worse half: ended"
    return f"{loss} in {units.duration(outcome.seconds)}"
