"""`deltaw rank`: a finished run, cut to each smaller rank, and the smallest that is enough."""

from __future__ import annotations

import json
from typing import Any

from deltaw.cli import show
from deltaw.cli.flags import Rank
from deltaw.files import units


def run(command: Rank) -> None:
    show.quiet_libraries()
    from deltaw.runs.rank import choose_rank
    from deltaw.runs.reports import rank

    with show.err.status("reading the run …") as status:
        found = choose_rank(command.run, command.rank, on_event=lambda event: _hear(event, status))
    results = found.results
    if command.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return
    show.out.print(_table(results, rank.metrics_of(results)))
    show.prose(f"\n{rank.sentence(results)}")
    for remark in rank.remarks(results):
        show.prose(remark, style="dim")
    show.facts({"report": str(found.report), "results": str(found.report.with_suffix(".json"))})


def _table(results: dict[str, Any], metrics: list[str]) -> Any:
    """Without what the report has room for."""
    from deltaw.runs.reports.compare import score

    largest = results["ranks"][-1]["rank"]
    made = show.table("r", "parameters", "adapter", "loss", f"less r = {largest}'s", "enough", *metrics)
    for row in results["ranks"]:
        d = row["difference"]
        difference = "–" if row["rank"] == largest else f"{d['value']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
        made.add_row(
            str(row["rank"]), f"{row['parameters']:,}", units.size(row["bytes"]), f"{row['loss']['value']:.4f}", difference,
            "yes" if row["enough"] else "no", *(score(row["scores"][m]) for m in metrics),
            style="bold" if row["rank"] == results["rank"] else None,
        )  # fmt: skip
    return made


def _hear(event: Any, status: Any) -> None:
    values = event.values
    if event.kind == "scored":
        status.update(f"{values['name']}: loss {values['loss']:.4f} …")
    elif values["kind"] == "step":
        left = units.duration(values["seconds_left"])
        status.update(f"training {values['name']}: step {values['step']} of {values['total_steps']}, {left} left …")
