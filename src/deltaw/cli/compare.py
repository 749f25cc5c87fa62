"""`deltaw compare`: a line for each finished candidate, then the table."""

from __future__ import annotations

from deltaw.cli import show
from deltaw.cli.flags import Compare


def run(command: Compare) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.cli import live

    with live.view("compare", out=show.out) as view:
        from deltaw.runs.compare import compare

        result = compare(command.model, command.data, command.run, command.compare, on_event=view.hear)
    from deltaw.runs.reports import compare as report

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
