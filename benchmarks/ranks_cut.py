"""Cut the runs at r = 64 to smaller ranks: does one run say what a sweep says?

    python benchmarks/ranks_cut.py e2e

Uses the runs of benchmarks/ranks_swept.py, and scores each cut on the sweep's test records, which chose nothing in those runs.
Adapters are not committed, so run this after it on the same machine. Adds what is new to results/rank_NAME.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import deltaw
import machine
from ranks_swept import OUT, SETUPS

LARGEST = 64
_OF_RANK = ("rank", "loss", "difference", "enough", "energy", "parameters", "bytes", "scores", "parts")
_OF_ALLOCATED = ("rank", "parameters", "loss", "difference", "better")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETUPS)
    name = parser.parse_args().name
    setup, path = SETUPS[name], machine.RESULTS / f"rank_{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seeds": {}}
    found |= {"model": setup.model, "data": setup.data, "full": LARGEST}
    for run in sorted((OUT / name / "runs").glob(f"*-r{LARGEST}-*")):
        seed = run.name.rpartition("-")[2]
        if seed not in found["seeds"] and (run / "result.json").is_file():
            found["seeds"][seed] = cut(run, setup.options)
            path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(name, seed, {row["rank"]: round(row["loss"]["value"], 4) for row in found["seeds"][seed]["ranks"]})


def cut(run: Path, swept: deltaw.SweepConfig) -> dict[str, Any]:
    """What `deltaw rank` says of this run, in short."""
    ranks = [int(r) for r in swept.ranks.split(",")]
    config = deltaw.RankConfig(
        ranks=",".join(str(r) for r in sorted(ranks) if r < LARGEST), records=str(run.parents[1] / "data" / "test.jsonl"),
        most=swept.test_most, margin=swept.margin, metrics=swept.metrics,
    )  # fmt: skip
    results = deltaw.choose_rank(run, config).results
    spectra = [layer["effective_rank"] for layer in results["layers"]]
    return {
        "rank": results["rank"], "margin": results["margin"],
        "records": results["records"]["count"], "items": results["records"]["items"],
        "base": results["base"],
        "ranks": [{k: row[k] for k in _OF_RANK} for row in results["ranks"]],
        "allocated": [{k: row[k] for k in _OF_ALLOCATED} for row in results["allocated"]],
        "effective_rank": {"least": min(spectra), "mean": sum(spectra) / len(spectra), "most": max(spectra)},
    }  # fmt: skip


if __name__ == "__main__":
    main()
