"""Measure a training step of an encoder with a classification head (MiniLM, 22.7M, SST-2): deltaw, PEFT, full, the floor.

    python benchmarks/encoder_step.py --data DATA/sst2 --model MINILM

deltaw's update is attached to a classifier and trained in a loop of one's own with the public functions; PEFT's likewise. The
head trains in every row. The floor is a frozen forward pass and a backward pass for activations only, on the same batches. Rows
run side by side, step by step (race.py). Writes results/encoder_step.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import race
from race import Clock

if TYPE_CHECKING:
    from rows import Step

SEED = 0


@dataclass(frozen=True)
class Case:
    data: str
    model: str
    rows: tuple[str, ...] = ("deltaw", "floor", "peft_loop", "full")
    targets: str = "all-linear"
    rank: int = 8
    batch: int = 32
    warm: int = 3
    turns: int = 20
    each: int = 5
    """Steps of a turn: one alone is too short to measure."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train.jsonl of text/label records")
    parser.add_argument("--model", help="folder of the encoder")
    parser.add_argument("--name", default="encoder_step", help="of the result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        race.work(chosen.worker, ROWS, lambda given: Case(**given))
        return
    if not (chosen.data and chosen.model):
        sys.exit("--data and --model: the folders of SST-2 and of the encoder")
    import machine

    found = []
    for case in (
        Case(chosen.data, chosen.model, targets=targets, rank=rank, batch=batch)
        for targets in ("all-linear", "qv")
        for rank, batch in ((8, 32), (64, 32), (8, 8))
    ):
        rows = race.heat(case.rows, asdict(case), warm=case.warm, count=case.turns, each=case.each)
        settings = {k: v for k, v in asdict(case).items() if k not in ("data", "model")}
        found.append(settings | {"rows": rows})
        print(json.dumps(found[-1], indent=1), file=sys.stderr, flush=True)
    machine.write(chosen.name, {"heats": found})


def deltaw_row(case: Case, clock: Clock) -> None:
    import deltaw

    model = classifier(case)
    deltaw.attach(model.base_model, deltaw.LoRA(rank=case.rank, alpha=16, targets=case.targets))
    model.classifier.requires_grad_(True)
    loop(case, clock, model)


def peft_row(case: Case, clock: Clock) -> None:
    import peft

    names: Any = ["query", "value"] if case.targets == "qv" else ["query", "key", "value", "dense"]
    config = peft.LoraConfig(r=case.rank, lora_alpha=16, target_modules=names, task_type="SEQ_CLS")
    model = peft.get_peft_model(classifier(case), config)
    loop(case, clock, model)


def full_row(case: Case, clock: Clock) -> None:
    loop(case, clock, classifier(case))


def floor_row(case: Case, clock: Clock) -> None:
    from rows import floor

    loop(case, clock, floor(classifier(case)))


ROWS: dict[str, Callable[[Case, Clock], None]] = {
    "deltaw": deltaw_row,
    "floor": floor_row,
    "peft_loop": peft_row,
    "full": full_row,
}


def classifier(case: Case) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(SEED)
    return AutoModelForSequenceClassification.from_pretrained(case.model, num_labels=2)


def loop(case: Case, clock: Clock, model: Any) -> None:
    from rows import plain_loop

    plain_loop(clock, model, steps(case), lr=5e-4)


def steps(case: Case) -> Iterator[Step]:
    """The same shuffled, padded batches for every row."""
    import torch
    from transformers import AutoTokenizer

    from rows import Step

    tokenizer = AutoTokenizer.from_pretrained(case.model)
    lines = (Path(case.data) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    records = [
        json.loads(line)
        for line in random.Random(SEED).sample(lines, case.batch * (case.warm + case.turns) * case.each)
    ]
    for at in range(0, len(records), case.batch):
        rows = records[at : at + case.batch]
        batch = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
        labels = torch.tensor([r["label"] for r in rows])
        yield Step({**batch, "labels": labels}, int(batch.attention_mask.sum()), len(rows))


if __name__ == "__main__":
    main()
