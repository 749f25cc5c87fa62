"""`deltaw compare`: a line for each candidate as it is done, then the table."""

from __future__ import annotations

from typing import Any

from deltaw.cli import show
from deltaw.cli.flags import Compare
from deltaw.files import units


def run(command: Compare) -> None:
    show.quiet_libraries()
    from deltaw.runs.compare import compare
    from deltaw.runs.reports import compare as report

    with show.err.status("getting ready …") as status:
        done = compare(
            command.model, command.data, command.run, command.compare, on_event=lambda event: _hear(event, status)
        )
    results = done.results
    rows = report.ranked(results)
    metrics = list(next((row["scores"] for row in rows if row.get("scores")), {}))
    for warning in results["warnings"]:
        show.prose(f"warning: {warning}", style="yellow", console=show.err)
    columns = [*report.COLUMNS, *metrics, *report.beside_columns(results)]
    made = show.table(*columns, title=f"\n{command.model} on {command.data}, scored on {results['sets']['test']}")
    for row in rows:
        made.add_row(*report.cells(row, metrics), *report.beside(row, results))
    show.out.print(made)
    if results["latency"]:
        timed = show.table("", *report.latency_columns(results), title="\nInference, over the base's time")
        for cells in report.latency_rows(results):
            timed.add_row(*cells)
        show.out.print(timed)
    show.prose(f"\n{report.headline(results)}")
    show.prose(report.note_on_intervals(results), style="dim")
    show.facts({"report": str(done.report), "results": str(done.folder / "results.json")})


def _hear(event: Any, status: Any) -> None:
    values = event.values
    if event.kind == "timing":
        status.update("timing inference with each method …")
    elif event.kind == "started":
        status.update(f"{values['name']}: lr {values['lr']:g}, seed {values['seed']} …")
    else:
        show.out.print(
            f"{values['name']:<12} lr {values['lr']:g}  seed {values['seed']}  {_outcome(values)}", soft_wrap=True
        )


def _outcome(values: dict[str, Any]) -> str:
    if "error" in values:
        return f"failed: {values['error'].splitlines()[0]}"
    loss = "" if values["valid_loss"] is None else f"held-out loss {values['valid_loss']:.4f}  "
    again = "" if values["fresh"] else "  (done before)"
    return f"{loss}{values['steps']} steps in {units.duration(values['seconds'])}{again}"
