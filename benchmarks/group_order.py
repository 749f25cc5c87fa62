"""Compare what is learned where records that begin alike meet in a step (`--share group`) with the usual order (`--share auto`).

    python benchmarks/group_order.py MODEL E2E                 # 100 items of E2E with all their references, three seeds
    python benchmarks/group_order.py MODEL E2E --items 40 --seeds 2

MODEL and E2E are folders. Both see the same records once, with the default settings, LoRA r = 8 on all linear layers, and are
scored on references of other items. Differences are paired by seed and item, with 95% intervals.

Writes results/group_order.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import deltaw
import machine
from deltaw.config import from_mapping, keys
from deltaw.data import read
from deltaw.runs.evaluation.bootstrap import of_losses
from deltaw.runs.evaluation.evaluate import evaluate

ORDERS = ("auto", "group")


def records_of(data: Path, items: int, folder: Path) -> tuple[Path, Path]:
    """Files of the records of so many items, and of 200 references of others, one an item."""
    by_prompt: dict[str, list[str]] = {}
    for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines():
        by_prompt.setdefault(json.loads(line)["prompt"], []).append(line)
    drawn = random.Random(0).sample(sorted(by_prompt), items + 200)
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    train.write_text("\n".join(line for prompt in drawn[:items] for line in by_prompt[prompt]) + "\n", encoding="utf-8")
    test.write_text("\n".join(by_prompt[prompt][0] for prompt in drawn[items:]) + "\n", encoding="utf-8")
    return train, test


def trained(model: str, train: Path, test: Path, share: str, seed: int) -> dict[str, Any]:
    """One run: its speed, and the summed loss and the tokens of each test record."""
    with tempfile.TemporaryDirectory() as folder:
        config = deltaw.TrainConfig(
            out=f"{folder}/run", seed=seed, epochs=1.0, valid_share=0.0, samples=0, dtype="float32", share=share
        )
        method = deltaw.LoRA(rank=8, targets="all-linear")
        result = deltaw.train(model, train, config, method=method, progress=False)
        used = from_mapping(deltaw.DataConfig, {k: result.settings[k] for k in keys(deltaw.DataConfig)})
        scored = evaluate(
            result.model, result.tokenizer, read(test, used), used, deltaw.GenerateConfig(), metrics=["loss"], progress=False
        )  # fmt: skip
        assert scored.losses is not None
        sums, counts, items = scored.losses
    state = result.state
    return {
        "seconds": round(state.step_seconds, 1), "records": state.records, "steps": state.step,
        "computed": round(1 - state.shared / state.tokens, 4), "losses": (sums, counts, items),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {order: [] for order in ORDERS}
    with tempfile.TemporaryDirectory() as folder:
        train, test = records_of(args.data, args.items, Path(folder))
        for seed in range(args.seeds):
            for order in ORDERS:
                runs[order].append(trained(args.model, train, test, order, seed))
                print(order, seed, {k: v for k, v in runs[order][-1].items() if k != "losses"}, flush=True)
    _, counts, items = runs["auto"][0]["losses"]
    measured = {
        order: of_losses(np.array([run["losses"][0] for run in of_order]), np.array(counts), np.array(items))
        for order, of_order in runs.items()
    }
    rows = {
        order: {
            "held_out_loss": measured[order].interval().plain(),
            "tokens_computed": [run["computed"] for run in of_order],
        }
        for order, of_order in runs.items()
    }
    less = measured["group"].less(measured["auto"]).interval().plain()
    print("group less auto:", less)
    first = runs["auto"][0]
    settings = {"items": args.items, "records": first["records"], "steps": first["steps"], "seeds": args.seeds}
    machine.write("group_order", {**settings, "orders": rows, "group_less_auto": less})


if __name__ == "__main__":
    main()
