"""`deltaw compare`: a line for each finished candidate, then the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Compare
from deltaw.files import units

if TYPE_CHECKING:
    from rich.status import Status

    from deltaw.runs.events import CandidateFinished, CompareEvent


def run(command: Compare) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.runs.compare import compare
    from deltaw.runs.reports import compare as report

    with show.err.status("getting ready …") as status:
        result = compare(
            command.model, command.data, command.run, command.compare, on_event=lambda event: _hear(event, status)
        )
    outcome = result.outcome
    for warning in outcome.warnings:
        show.prose(f"warning: {warning}", style="yellow", console=show.err)
    columns = [*report.COLUMNS, *outcome.metrics, *report.beside_columns(outcome)]
    table = show.table(*columns, title=f"\n{command.model} on {command.data}, scored on {outcome.sets['test']}")
    for row in outcome.ranked:
        table.add_row(*report.cells(row, outcome.metrics), *report.beside(row, outcome))
    show.out.print(table)
    if outcome.latency:
        timed = show.table("", *report.latency_columns(outcome), title="\nInference, over the base's time")
        for cells in report.latency_rows(outcome):
            timed.add_row(*cells)
        show.out.print(timed)
    show.prose(f"\n{report.headline(outcome)}")
    for verdict in report.verdicts(outcome):
        show.prose(verdict)
    show.prose(report.note_on_intervals(outcome), style="dim")
    show.facts({"report": str(result.report), "results": str(result.folder / "results.json")})


def _hear(event: CompareEvent, status: Status) -> None:
    from deltaw.runs.events import CandidateStarted, RecordsRead, TimingStarted

    if isinstance(event, RecordsRead):
        show.notes(event.notes)
    elif isinstance(event, TimingStarted):
        status.update("timing inference with each method …")
    elif isinstance(event, CandidateStarted):
        status.update(f"{event.name}: lr {event.lr:g}, seed {event.seed} …")
    else:
        show.out.print(f"{event.name:<12} lr {event.lr:g}  seed {event.seed}  {_outcome(event)}", soft_wrap=True)


def _outcome(event: CandidateFinished) -> str:
    from deltaw.runs.results.compare import CandidateScore
    from deltaw.runs.results.study import Failed

    outcome = event.outcome
    if isinstance(outcome, Failed):
        return f"failed: {outcome.error.splitlines()[0]}"
    assert isinstance(outcome, CandidateScore)
    figures = outcome.figures
    loss = "" if figures.valid_loss is None else f"held-out loss {figures.valid_loss:.4f}  "
    again = "" if event.fresh else "  (done before)"
    return f"{loss}{figures.steps} steps in {units.duration(figures.seconds)}{again}"
