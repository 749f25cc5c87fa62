"""`deltaw sweep`: a line for each finished candidate, then the table and the recommended rank."""

from __future__ import annotations

from deltaw.cli import show
from deltaw.cli.flags import Sweep


def run(command: Sweep) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.cli import live

    with live.view("sweep", out=show.out, quiet=command.json) as view:
        from deltaw.runs.sweep import sweep

        result = sweep(command.model, command.data, command.run, command.sweep, on_event=view.hear)
    from deltaw.runs.reports.sweep import COLUMNS, cells, metrics_of, note_on_intervals, ordered, sentences

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
