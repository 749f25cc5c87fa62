"""Measure how often a rank that is worse by exactly the margin is called enough, and one of equal candidates worse.

    python benchmarks/intervals.py --trials 1000      # results/intervals.json, some minutes on one core
    python benchmarks/intervals.py --trials 200       # a quick look

Losses are planted, so the truth is known; nothing is trained. Records belong to items like E2E's test records to prompts: 1 to 12
records an item, 5 to 29 predictions a record. The noise of the difference between two ranks has a part of the item, by the
intraclass correlation, and a part of the seed. The seed's standard deviation is in units of the items' share in the mean.

`enough` should be at most 2.5%, `called_worse` at most 5%. Beside `enough` stands what the same trials give by records, and by
items without the seeds' variance. `worse` counts intervals that lie above zero.
"""

from __future__ import annotations

import argparse
import math
from itertools import product
from typing import Any

import numpy as np

import machine
from deltaw.runs.evaluation.bootstrap import RESAMPLES, Array, Measured, chosen, compared, of_losses

MARGIN, NOISE = 0.01, 0.1
ITEMS, CORRELATIONS, RUNS, SEEDS = (5, 10, 20, 300), (0.3, 0.45, 0.6), (1, 2, 3, 5), (0.0, 0.5, 1.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    of_e2e = [(47, c, s, v) for c, s, v in product(CORRELATIONS, RUNS, SEEDS) if s > 1 or not v]
    of_other = [(n, 0.45, s, float(s > 1)) for n, s in product(ITEMS, RUNS)]
    cases = [dict(zip(("items", "correlation", "runs", "seed_sd"), case, strict=True)) for case in of_e2e + of_other]
    alone = [case for case in cases if case["runs"] == 1 and case["correlation"] == 0.45]
    candidates = [{"candidates": c, "runs": s, "items": n} for c, s, n in product((3, 6), RUNS, (20, 47))]
    result = {
        "trials": trials, "margin": MARGIN, "resamples": RESAMPLES,
        "ranks": [case | enough(case, "normal", trials) for case in cases],
        "skewed": [case | enough(case, "skewed", trials) for case in alone],
        "compared": [case | equals(case, trials // 2) for case in candidates],
    }  # fmt: skip
    machine.write("intervals", result)


def enough(case: dict[str, Any], kind: str, trials: int) -> dict[str, float]:
    """Shares of trials whose interval misses the truth, the margin: below it, so that the rank is enough, or above."""
    chance = np.random.default_rng(
        [case["items"], case["runs"], round(100 * case["correlation"]), round(10 * case["seed_sd"])]
    )
    counts = dict.fromkeys(("enough", "worse", "enough_by_records", "enough_without_seeds"), 0)
    widths = []
    for _ in range(trials):
        sums, whole, predictions, items = planted(chance, case, kind)
        small, large = (of_losses(each * predictions, predictions, items) for each in (sums, whole))
        tested = chosen({1: small, 64: large}, MARGIN).tested[0]
        counts["enough"] += tested.enough
        counts["worse"] += tested.difference.low > MARGIN
        widths.append(tested.difference.high - tested.difference.low)
        records = [of_losses(each * predictions, predictions) for each in (sums, whole)]
        counts["enough_by_records"] += upper_end(records[0].less(records[1])) <= MARGIN
        counts["enough_without_seeds"] += upper_end(small.less(large)) <= MARGIN
    return {name: round(count / trials, 4) for name, count in counts.items()} | {
        "median_width": float(np.median(widths))
    }


def upper_end(difference: Measured) -> float:
    """Of the normal interval over these items, which leaves out how runs differ."""
    mean = difference.parts.mean(0)
    return difference.value + 1.96 * float(mean.std()) / math.sqrt(len(mean))


def planted(chance: np.random.Generator, case: dict[str, Any], kind: str) -> tuple[Array, Array, Array, Array]:
    """Losses per prediction [runs, records] of a rank that is worse by the margin, and of the largest; each record's number of
    predictions; and its item."""
    items = np.repeat(np.arange(case["items"]), chance.integers(1, 13, case["items"]))
    predictions = chance.integers(5, 30, len(items)).astype(float)
    shared, own = case["correlation"], 1 - case["correlation"]

    def noise(size: int) -> Array:
        return chance.standard_normal(size) if kind == "normal" else chance.exponential(1.0, size) - 1

    drawn = math.sqrt(shared) * noise(case["items"])[items] + math.sqrt(own) * noise(len(items))
    by_item, all_of = np.bincount(items, predictions), predictions.sum()
    left = math.sqrt(shared * (by_item**2).sum() + own * (predictions**2).sum()) / all_of
    runs = case["seed_sd"] * left * chance.standard_normal((case["runs"], 1))
    large = np.ones((case["runs"], len(items)))
    return (1 + MARGIN) * large + NOISE * (drawn + runs), large, predictions, items


def equals(case: dict[str, Any], trials: int) -> dict[str, float]:
    """The share of studies of equal candidates in which one is called worse."""
    chance = np.random.default_rng([case["candidates"], case["runs"], case["items"]])
    wrong = 0
    for _ in range(trials):
        common = chance.standard_normal(case["items"])
        own = chance.standard_normal((case["candidates"], 1, case["items"]))
        seeds = chance.standard_normal((case["candidates"], case["runs"], 1)) / math.sqrt(case["items"])
        parts = common + own + (seeds if case["runs"] > 1 else 0.0)
        measured = {str(i): Measured(each.mean(1), each, tuple(range(len(each)))) for i, each in enumerate(parts)}
        wrong += any(each.worse for each in compared(measured))
    return {"called_worse": round(wrong / trials, 4)}


if __name__ == "__main__":
    main()
