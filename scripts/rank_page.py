"""Write docs/rank.md from results/: ranks trained, and ranks cut from one run, on the same test records.

    python -m scripts.rank_page

benchmarks/ranks_swept.py and benchmarks/ranks_cut.py make the results. scripts/rank_page.md is the text around the tables.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.evidence_page import RESULTS, ROOT, of_several, read, table

from deltaw.files import units
from deltaw.runs.memory.machine import in_words
from deltaw.runs.reports.compare import interval, score

TEXT, PAGE = ROOT / "scripts" / "rank_page.md", ROOT / "docs" / "rank.md"
NAMES = ("e2e", "requests", "sst2", "cola")
# Hu et al. 2021, Table 7: W_q in GPT-3's 48th layer. Trained at r, ‖UᵀWVᵀ‖ with U, V of ΔW, of W, random; ‖ΔW‖, factor
TABLE_7 = (("4", "0.32", "21.67", "0.02", "6.91", "21.5"), ("64", "1.90", "37.71", "0.33", "3.57", "1.9"))
# Table 6: GPT-3 with r on q and v: accuracy on WikiSQL
TABLE_6 = {1: "73.4%", 2: "73.3%", 4: "73.7%", 8: "73.8%", 64: "73.5%"}


def main() -> None:
    swept = {name: results for name in NAMES if (results := result(f"sweep_{name}"))}
    cut = {name: result(f"rank_{name}") or {"seeds": {}} for name in swept}
    tables = {
        "agreement": agreement(swept, cut),
        "swept": "\n".join(titled(results, of_ranks(results, cut[name])) for name, results in swept.items()),
        "allocated": allocated(swept, cut),
        "few_weights": of_few_weights(swept, of_kind("qv")),
        "weights": "\n".join(titled(results, of_weights(results)) for results in of_kind("budget").values()),
        "directions": directions(swept),
        "amplified": amplified([results for name in NAMES if (results := result(f"amplified_{name}"))]),
    }
    PAGE.write_text(string.Template(TEXT.read_text(encoding="utf-8")).substitute(tables), encoding="utf-8")


def of_kind(kind: str) -> dict[str, Any]:
    """Return the sweeps of one kind (q and v alone, equal budgets): data set → results."""
    return {name: results for name in NAMES if (results := result(f"sweep_{name}_{kind}"))}


def result(name: str) -> Any:
    return read(RESULTS / f"{name}.json")


def titled(results: Any, shown: str) -> str:
    """Return a table under a line that names model, data and settings."""
    settings, first = results["settings"], results["rows"][0]
    run, seeds = settings["run"], seeds_of(results)
    return (
        f"**{model_and_data(results)}**: {run['steps']} steps of {run['batch']} records, lr {first['lr']:g}, "
        f"{seeds} seed{'s' * (seeds > 1)}, {results['sets']['test']} to test "
        f"({in_words(results['environment'])}).\n\n{shown}"
    )


# --- tables -----------------------------------------------------------------------------------------------------


def agreement(swept: Mapping[str, Any], cut: Mapping[str, Any]) -> str:
    """Return the table of what each way recommends."""
    rows = []
    for name, results in swept.items():
        cuts = cut[name]["seeds"].values()
        rows.append([
            f"{results['settings']['model']}, {results['settings']['data']}",
            str(choice_of(results)["rank"]),
            str(min(results["rows"], key=lambda row: row["scores"]["loss"]["value"])["rank"]),
            ", ".join(str(entry["rank"]) for entry in cuts) or "–",
            ", ".join(f"{entry['effective_rank']['mean']:.0f}" for entry in cuts) or "–",
        ])  # fmt: skip
    columns = ["", "sweep: enough", "sweep: least loss", "one run at r = 64, cut: enough", "effective rank of its ΔW"]
    return table(columns, rows)


def of_ranks(results: Any, cuts: Any) -> str:
    """Return a row for each rank: trained at it, and cut to it from a run at the largest. What is enough is bold."""
    choice, other, seeds = choice_of(results), beside_the_loss(results), cuts["seeds"]
    tested = {entry["rank"]: entry for entry in choice["tested"]}
    rows = []
    for row in sorted(results["rows"], key=lambda row: row["rank"]):
        rank = row["rank"]
        rows.append([
            bold(str(rank), rank == choice["rank"]), f"{row['parameters']:,}", units.size(row["bytes"]),
            interval(tested[rank]["loss"]), interval(tested[rank]["difference"]),
            *(score(of_several(row["scores"][m])) for m in other),
            *(of_cut(entry, rank) for entry in seeds.values()),
        ])  # fmt: skip
    columns = ["r", "parameters", "adapter", "loss", f"less that of r = {choice['tested'][-1]['rank']}", *other]
    return table([*columns, *(f"cut, seed {seed}" for seed in seeds)], rows)


def of_cut(cut: Any, rank: int) -> str:
    loss = next(row["loss"]["value"] for row in cut["ranks"] if row["rank"] == rank)
    return bold(f"{loss:.4f}", rank == cut["rank"])


def allocated(swept: Mapping[str, Any], cut: Mapping[str, Any]) -> str:
    """Return the table of ranks by layer against one rank for all, at equal parameters."""
    rows = [
        [
            f"{swept[name]['settings']['data']}, seed {seed}", str(entry["rank"]), f"{entry['parameters']:,}",
            interval(entry["difference"]),
        ]
        for name, results in cut.items()
        for seed, cuts in results["seeds"].items()
        for entry in cuts["allocated"]
    ]  # fmt: skip
    return table(["", "r, on average", "parameters", "loss less that of the same r everywhere"], rows)


def of_few_weights(swept: Mapping[str, Any], few: Mapping[str, Any]) -> str:
    """Return each rank's loss on q and v alone, beside that on all dense layers, with the paper's accuracies (Table 6)."""
    ranks = sorted({row["rank"] for results in few.values() for row in results["rows"]})
    rows = [["GPT-3 on WikiSQL (the paper)", "q,v", "–", "–", *(TABLE_6.get(rank, "–") for rank in ranks)]]
    for name, results in few.items():
        for where, entry in (("q,v", results), ("all", swept[name])):
            losses = {row["rank"]: f"{row['scores']['loss']['value']:.4f}" for row in entry["rows"]}
            counts = str(seeds_of(entry)), str(choice_of(entry)["rank"])
            rows.append([model_and_data(entry), where, *counts, *(losses.get(rank, "–") for rank in ranks)])
    return table(["", "weights", "seeds", "enough", *(f"r = {rank}" for rank in ranks)], rows)


def of_weights(results: Any) -> str:
    """Return a row for each choice of weights, all with equal parameters; the least loss first."""
    other, rows = beside_the_loss(results), {row["name"]: row for row in results["rows"]}
    shown_rows = []
    for entry in results["compared"]:
        row = rows[entry["name"]]
        shown_rows.append([
            row["targets"], str(row["rank"]), f"{row['parameters']:,}", interval(entry["score"]),
            bold(interval(entry["difference"]), entry["worse"]), *(score(of_several(row["scores"][m])) for m in other),
        ])  # fmt: skip
    return table(["weights", "r", "parameters", "loss", "less the least one", *other], shown_rows)


def directions(swept: Mapping[str, Any]) -> str:
    """Return what the largest rank's ΔW has in common with another run's, as means over layers."""
    rows = []
    for results in swept.values():
        for pair in results["alike"]:
            count = sum(row["count"] for row in pair["rows"])
            means = [
                f"{sum(row[key] * row['count'] for row in pair['rows']) / count:.2f}"
                for key in ("first", "first_of_A", "first_by_chance", "all", "all_of_A", "all_by_chance")
            ]
            least = min(pair["rank"], pair["other_rank"])
            rows.append(
                [results["settings"]["data"], f"r = {pair['rank']}", pair["with"], *means[:3], str(least), *means[3:]]
            )
    of = ["of ΔW", "of A", "by chance"]
    return table(["", "of", "and", *(f"φ(1, 1) {x}" for x in of), "n", *(f"φ(n, n) {x}" for x in of)], rows)


def amplified(results: Sequence[Any]) -> str:
    """Return the table of how ΔW lies to W, the paper's figures first."""
    rows = [["GPT-3 (the paper), W_q, layer 48", *row] for row in TABLE_7]
    for entry in results:
        for row in entry["rows"]:
            values = (row[key] for key in ("by_update", "by_weight", "by_chance", "update", "factor"))
            title = f"{entry['data']}, {row['layer'].removeprefix('model.').removeprefix('bert.encoder.')}"
            rows.append([title, str(row["trained"]), *(f"{value:.2f}" for value in values)])
    columns = ["", "r", "‖UᵀWVᵀ‖, U, V of ΔW", "of W", "random", "‖ΔW‖", "factor"]
    return table(columns, rows)


def choice_of(results: Any) -> Any:
    """Return the choice of a sweep with one choice of targets."""
    (choice,) = results["choices"].values()
    return choice


def seeds_of(results: Any) -> int:
    """Return the number of seeds that each candidate of a sweep was trained with."""
    return len(results["rows"][0]["scores"]["loss"]["seeds"])


def model_and_data(results: Any) -> str:
    return f"{results['settings']['model']} on {results['settings']['data']}"


def beside_the_loss(results: Any) -> Sequence[str]:
    return [metric for metric in results["rows"][0]["scores"] if metric != "loss"]


def bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


if __name__ == "__main__":
    main()
