"""Write docs/rank.md from results/: ranks trained and ranks cut from one run, on the same test records; which weights to train.

    python -m scripts.rank_page

benchmarks/ranks_swept.py and benchmarks/ranks_cut.py make the results. scripts/rank_page.md is the text around the tables.
"""

from __future__ import annotations

import string
from typing import Any

from scripts.evidence_page import RESULTS, ROOT, read, table

from deltaw import units
from deltaw.environment import in_words
from deltaw.study.comparison import interval, score

TEXT, PAGE = ROOT / "scripts" / "rank_page.md", ROOT / "docs" / "rank.md"
NAMES = ("e2e", "requests", "sst2", "cola")


def main() -> None:
    tables = {"swept": swept(), "agreement": agreement(), "budgets": budgets(), "qv": qv()}
    PAGE.write_text(string.Template(TEXT.read_text(encoding="utf-8")).substitute(tables), encoding="utf-8")


def results(name: str) -> Any:
    return read(RESULTS / f"{name}.json")


def title(found: Any) -> str:
    run, rows = found["settings"]["run"], found["rows"]
    seeds = len(next(row["scores"]["loss"]["seeds"] for row in rows if "scores" in row))
    return (
        f"{found['settings']['model']} on {found['settings']['data']}: {run['steps']} steps of {run['batch']} records, lr "
        f"{run['lr']:g}, α = {rows[0]['alpha']:g}, {seeds} seed{'s' * (seeds > 1)} ({in_words(found['environment'])})"
    )


def metric(found: Any) -> str | None:
    """The one beside the loss."""
    return next((m for row in found["rows"] for m in row.get("scores", {}) if m != "loss"), None)


def swept() -> str:
    """Of each data set: a row for each rank, trained and cut."""
    parts = []
    for name in NAMES:
        found = results(f"sweep_{name}")
        if found is None:
            continue
        cuts = results(f"rank_{name}") or {"seeds": {}}
        (choice,) = found["choices"].values()
        tested, other = {each["rank"]: each for each in choice["tested"]}, metric(found)
        columns = [
            "r",
            "parameters",
            "adapter",
            "loss, trained",
            "less that of the largest",
            *([other] if other else []),
        ]
        columns += [f"cut, seed {seed}" for seed in cuts["seeds"]]
        rows = []
        for row in sorted(found["rows"], key=lambda row: row["rank"]):
            each = tested[row["rank"]]
            own = [f"{'**' * (choice['rank'] == row['rank'])}{row['rank']}{'**' * (choice['rank'] == row['rank'])}"]
            own += [
                f"{row['parameters']:,}",
                units.size(row["bytes"]),
                interval(each["loss"]),
                interval(each["difference"]),
            ]
            own += [score(row["scores"][other])] if other else []
            rows.append(own + [of_cut(cut, row["rank"]) for cut in cuts["seeds"].values()])
        parts += [f"### {title(found)}\n", table(columns, rows)]
    return "\n".join(parts)


def of_cut(cut: Any, rank: int) -> str:
    text = f"{next(row['loss']['value'] for row in cut['ranks'] if row['rank'] == rank):.4f}"
    return f"**{text}**" if cut["rank"] == rank else text


def agreement() -> str:
    """What each way recommends."""
    rows = []
    for name in NAMES:
        found, cuts = results(f"sweep_{name}"), results(f"rank_{name}")
        if found is None or cuts is None:
            continue
        (choice,) = found["choices"].values()
        by_cut = ", ".join(str(cut["rank"]) for cut in cuts["seeds"].values())
        least = min(found["rows"], key=lambda row: row["scores"]["loss"]["value"])["rank"]
        effective = ", ".join(f"{cut['effective_rank']['mean']:.1f}" for cut in cuts["seeds"].values())
        rows.append([found["settings"]["data"], str(choice["rank"]), str(least), by_cut, effective])
    columns = ["", "sweep's r", "least loss at r", "r of one run, by seed", "effective rank of ΔW, mean over layers"]
    return table(columns, rows) if rows else ""


def budgets() -> str:
    """Of each data set: a row for each choice of weights, of equal parameters."""
    parts = []
    for name in NAMES:
        found = results(f"sweep_{name}_budget")
        if found is None:
            continue
        other = metric(found)
        rows = [
            [row["targets"], str(row["rank"]), f"{row['parameters']:,}", score(row["scores"]["loss"])]
            + ([score(row["scores"][other])] if other else [])
            for row in sorted(found["rows"], key=lambda row: row["scores"]["loss"]["value"])
        ]
        columns = ["weights", "r", "parameters", "loss", *([other] if other else [])]
        parts += [f"### {title(found)}\n", table(columns, rows)]
    return "\n".join(parts)


def qv() -> str:
    """Ranks of q and v alone."""
    parts = []
    for name in NAMES:
        found = results(f"sweep_{name}_qv")
        if found is None:
            continue
        (choice,) = found["choices"].values()
        rows = [
            [str(row["rank"]), f"{row['parameters']:,}", interval(each["loss"]), interval(each["difference"])]
            for row, each in zip(sorted(found["rows"], key=lambda row: row["rank"]), choice["tested"], strict=True)
        ]
        parts += [f"### {title(found)}\n", table(["r", "parameters", "loss", "less that of the largest"], rows)]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
