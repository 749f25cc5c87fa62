"""Compare methods on real data, for docs/evidence.md: SmolLM2 on E2E, MiniLM on four tasks of GLUE.

    python benchmarks/methods_compared.py e2e --model .cache/smollm2 --data E2E
    python benchmarks/methods_compared.py cola --model MINILM --data COLA --at-once 8      # eight methods side by side

MODEL and DATA are folders. Every method gets the same records in the same order, and the same number of steps. On CoLA each has
three learning rates a factor of three apart; the best one on held-out records is scored on the test records. What is finished in
.cache/compared is not repeated. Writes results/compare_NAME.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import deltaw
from deltaw.methods.registry import DEFAULT
from deltaw.runs.compare import compare
from deltaw.runs.events import CandidateFinished, CandidateStarted, CompareEvent
from deltaw.runs.results.compare import CandidateScore
from setups import Setup, glue, write

OUT = Path(".cache/compared")


def chosen(methods: str = DEFAULT, **options: object) -> deltaw.CompareConfig:
    return deltaw.CompareConfig(methods=methods, latency=False, **options)  # type: ignore[arg-type]


# Each method's best learning rate on E2E's held-out records, of those a factor of three apart that results/rates_e2e.json holds;
# DoRA's is LoRA's. A CPU cannot try them all in a day
BEST = (
    "full(lr=4.5e-4),bitfit(lr=6e-3),houlsby(lr=3e-3),pfeiffer(lr=3e-3),prefix(lr=1e-2),ia3(lr=3e-2),lora-qv(lr=9e-3),"
    "lora(lr=3e-3),dora(lr=3e-3)"
)


SETUPS = {
    "e2e": Setup(
        "SmolLM2-135M-Instruct", "E2E", 
        deltaw.TrainConfig(
            data=deltaw.DataConfig(template="plain", separator=""), steps=250, batch=8, eval_every=250, dtype="float32"
        ),
        chosen(BEST, test_most=400, metrics="loss,bleu"),
    ),
    "cola": glue("CoLA", chosen(lrs=3, seeds=3, test_most=1043, metrics="loss,accuracy,matthews"), steps=800),
    "mrpc": glue("MRPC", chosen(lrs=1, seeds=3, test_most=1725, metrics="loss,accuracy,f1"), steps=150),
    "rte": glue("RTE", chosen(lrs=1, seeds=3, test_most=277, metrics="loss,f1,accuracy"), steps=120),
    "sst2": glue("SST-2", chosen(lrs=1, seeds=3, test_most=1821, metrics="loss,f1,accuracy"), steps=200),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETUPS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--at-once", type=int, default=1, help="so many methods side by side, each in a process of its own"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    setup, folder = SETUPS[given.name], OUT / given.name
    if given.at_once > 1 and given.only is None:
        side_by_side(given.at_once, setup, folder)
    methods = given.only or setup.options.methods
    config = replace(setup.config, out=folder)
    options = replace(setup.options, methods=methods)
    done = compare(given.model, given.data, config, options, on_event=lambda event: print(said(event), flush=True))
    if given.only is None:
        results = done.results
        for row in results["rows"]:
            row["name"] = row["name"].partition("(")[0]
        write(f"compare_{given.name}", results, setup)


def side_by_side(count: int, setup: Setup, folder: Path) -> None:
    """Each method by a process with this command; the first one writes the sets of records that the others find."""

    def one(method: str) -> None:
        subprocess.run([sys.executable, *sys.argv, "--only", method], check=True)

    with ThreadPoolExecutor(count) as pool:
        waiting = []
        for method in setup.options.methods.split(","):
            waiting.append(pool.submit(one, method))
            while not (folder / "data" / "test.jsonl").is_file() and not waiting[0].done():
                time.sleep(0.1)
        for each in waiting:
            each.result()


def said(event: CompareEvent) -> str:
    if not isinstance(event, (CandidateStarted, CandidateFinished)):
        return event.kind
    outcome = event.outcome if isinstance(event, CandidateFinished) else None
    loss = outcome.valid_loss if isinstance(outcome, CandidateScore) else ""
    return f"{event.kind} {event.name} lr {event.lr:.2g} seed {event.seed} {loss}"


if __name__ == "__main__":
    main()
