"""`deltaw doctor`: the machine as deltaw sees it, and what is slow here and why."""

from __future__ import annotations

import json

from deltaw.cli import show
from deltaw.cli.flags import Doctor


def run(command: Doctor) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.runs.survey.doctor import checkup

    seen = checkup()
    if command.json:
        print(json.dumps({**seen.to_json(), "advice": seen.advice}, indent=2, ensure_ascii=False))
        return
    for title, facts in seen.sections.items():
        show.out.print(f"\n{title}", style="bold")
        show.facts({f"  {fact.name}": fact.value for fact in facts})
    show.out.print("\nWhat to do" if seen.advice else "\nNothing here is slow or missing.", style="bold")
    for advice in seen.advice:
        show.prose(f"  {advice}")
