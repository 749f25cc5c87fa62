"""Write the measured table of docs/settings.md from results/defaults.json, which benchmarks/defaults.py writes.

    python -m scripts.settings_page

Only what stands between the two comments of the page is written; the rest of it is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "results" / "defaults.json", ROOT / "docs" / "settings.md"
PLACE = re.compile(r"(<!-- measured: begin -->\n).*?(<!-- measured: end -->)", re.DOTALL)


def main() -> None:
    tasks = json.loads(RESULTS.read_text(encoding="utf-8"))["tasks"]
    text, count = PLACE.subn(
        lambda place: place[1] + "\n" + table(tasks) + "\n" + place[2], PAGE.read_text(encoding="utf-8")
    )
    assert count == 1, f"{PAGE} has no place for the table"
    PAGE.write_text(text, encoding="utf-8")


def table(tasks: Mapping[str, Any]) -> str:
    """Return a row for each task: the defaults with their score, and the best of the grid."""
    lines = [
        "| data | records | model | defaults: lr, passes | score | best of the grid: lr, passes | score | share of the best |",
        "| --- | --: | --- | --: | --: | --: | --: | --: |",
    ]
    for name, task in tasks.items():
        if not task.get("default") or not task["grid"]:
            continue
        metric, default = task["metric"], task["default"]
        best = next(r for r in task["grid"] if (r["lr"], r["epochs"]) == (task["best_lr"], task["best_epochs"]))
        share = "no gain" if task["share_of_best"] is None else f"{task['share_of_best']:.1%}"
        cells = [name, f"{task['records']:,}" if task["records"] else "all", task["model"]]
        for row in (default, best):
            cells += [f"{row['lr']:g}, {row['epochs']:g}", f"{metric} {row['test'][metric]:.4g}"]
        lines.append(f"| {' | '.join([*cells, share])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
