"""Measure how ΔW lies to W, as in the paper's Table 7 (section 7.3), for q and v in the middle of the model.

    python benchmarks/ranks_amplified.py e2e --model SMOLLM2

Uses the first seed's runs at r = 4 and r = 64 of benchmarks/ranks_swept.py. Adapters are not committed, so run this after it
on the same machine. Writes results/amplified_NAME.json.
"""

from __future__ import annotations

import argparse

import machine
from deltaw.methods.targets import role
from deltaw.model.pretrained import load_pretrained
from deltaw.runs.directions import amplifications
from deltaw.runs.folder import finished
from ranks_swept import OUT, RANKS

OF_RANKS = (4, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RANKS)
    parser.add_argument("--model", required=True)
    given = parser.parse_args()
    setup = RANKS[given.name]
    runs = {rank: finished(next((OUT / given.name / "runs").glob(f"*-r{rank}-*-0"))) for rank in OF_RANKS}
    task = next(iter(runs.values())).config().data.task
    model = load_pretrained(given.model, task="causal" if task == "auto" else task, dtype="float32").model
    rows = []
    for rank, run in runs.items():
        layers = amplifications(model, run, rank)
        rows += [{"trained": rank, **layer.to_json()} for layer in layers if role(layer.layer) in ("q", "v")]
    machine.write(f"amplified_{given.name}", {"model": setup.model, "data": setup.data, "rows": rows})


if __name__ == "__main__":
    main()
