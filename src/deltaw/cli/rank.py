"""`deltaw rank`: a finished run cut to each smaller rank, and the smallest that is enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Rank
from deltaw.files import units

if TYPE_CHECKING:
    from rich.table import Table

    from deltaw.runs.results.rank import RankResults


def run(command: Rank) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.cli import live

    with live.view("rank", quiet=command.json) as view:
        from deltaw.runs.rank import choose_rank

        choice = choose_rank(command.run, command.rank, on_event=view.hear)
    from deltaw.runs.reports.rank import remarks, sentence

    outcome = choice.outcome
    if command.json:
        print(show.as_json(outcome.to_json()))
        return
    show.out.print(_table(outcome))
    show.prose(f"\n{sentence(outcome)}")
    for remark in remarks(outcome):
        show.prose(remark, style="dim")
    show.facts({"report": str(choice.report), "results": str(choice.report.with_suffix(".json"))})


def _table(outcome: RankResults) -> Table:
    """Return a row for each rank, without the columns that only the report has room for."""
    from deltaw.runs.reports.compare import score

    largest, metrics = outcome.largest.rank, outcome.metrics
    table = show.table("r", "parameters", "adapter", outcome.by, f"less r = {largest}'s", "enough", *metrics)
    for row in outcome.ranks:
        d = row.tested.difference
        difference = "–" if row.rank == largest else f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
        table.add_row(
            str(row.rank), f"{row.parameters:,}", units.size(row.bytes), f"{row.tested.loss.value:.4f}", difference,
            "yes" if row.tested.enough else "no", *(score(row.scores[m]) for m in metrics),
            style="bold" if row.rank == outcome.rank else None,
        )  # fmt: skip
    return table
