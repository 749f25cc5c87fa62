"""Compare what deltaw and PEFT learn from the same records in the same order and the same A and B.

    python benchmarks/same_learning.py --data DATA/e2e --steps 60

Speed that changes learning is no speed. deltaw runs in float32 and in the precision that it chooses by itself; a plain PEFT loop
runs in float32 (the model's own loss, AdamW), on deltaw's batches with deltaw's schedule. Writes results/same_learning.json: the
loss of every step, and the held-out loss at the end by the model's own logits in float32, with machine and versions.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import deltaw
import machine
from deltaw.config import DataConfig
from deltaw.data import Example, Order, collate, encode, read
from deltaw.model.pretrained import load_pretrained
from deltaw.training.events import Event, Stepped
from deltaw.training.loop import LoopPlan, run_loop
from deltaw.training.losses import CompletionLoss
from deltaw.training.optim import lr_factor
from rows import completion

HERE = Path(__file__).resolve().parent
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="folder with train.jsonl and valid.jsonl of prompt/completion records"
    )
    parser.add_argument("--model", default=str(HERE.parent / ".cache" / "smollm2"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=200, help="records of valid.jsonl")
    parser.add_argument("--name", default="same_learning")
    chosen = parser.parse_args()
    tokenizer = load_pretrained(chosen.model).tokenizer
    train, held_out = (
        encode(sample(Path(chosen.data) / name, count), tokenizer, DataConfig(template="plain")).examples
        for name, count in (("train.jsonl", 8 * chosen.steps), ("valid.jsonl", chosen.held_out))
    )
    config = deltaw.TrainConfig(lr=5e-4, steps=chosen.steps, log_every=1, seed=SEED)
    rows: dict[str, Callable[[str], tuple[list[float], Any]]] = {
        "deltaw, float32": lambda folder: deltaw_row(chosen.model, "float32", train, config, folder),
        "deltaw, auto": lambda folder: deltaw_row(chosen.model, "auto", train, config, folder),
        "PEFT, float32": lambda folder: peft_row(chosen.model, train, config, folder),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:  # each leaves its adapter there, and PEFT starts from deltaw's first
        for row, run in rows.items():
            losses, trained = run(folder)
            found[row] = {
                "held_out_loss": round(held_out_loss(trained, held_out), 4),
                "losses": [round(v, 4) for v in losses],
            }
            print(row, found[row]["held_out_loss"], losses[-3:], file=sys.stderr, flush=True)
    theirs = found["PEFT, float32"]["losses"]
    for values in found.values():
        values["largest_difference_from_peft"] = max(abs(a - b) for a, b in zip(values["losses"], theirs, strict=True))
    machine.write(chosen.name, {"steps": chosen.steps, "batch": config.batch, "lr": config.lr, "rows": found})


def sample(path: Path, count: int) -> Any:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as folder:
        picked = Path(folder) / path.name
        picked.write_text("".join(random.Random(SEED).sample(lines, count)), encoding="utf-8")
        return read(str(picked), DataConfig())


def deltaw_row(
    name: str, dtype: str, train: list[Example], config: deltaw.TrainConfig, folder: str
) -> tuple[list[float], Any]:
    losses: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, Stepped):
            losses.append(event.loss)

    model = load_pretrained(name, dtype=dtype, to_train=True).model  # type: ignore[arg-type]
    torch.manual_seed(SEED)
    deltaw.attach(model, deltaw.LoRA(rank=8, alpha=16))
    if dtype == "float32":
        deltaw.save(model, Path(folder) / "start")
    run_loop(LoopPlan(CompletionLoss(model), train, (), config, on_event=hear))
    adapter = deltaw.save(model, Path(folder) / dtype)
    fresh = load_pretrained(name, dtype="float32").model
    deltaw.load(fresh, adapter)
    return losses, fresh


def peft_row(name: str, train: list[Example], config: deltaw.TrainConfig, folder: str) -> tuple[list[float], Any]:
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(Path(folder) / "start"), is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches(train, config)):
        optimizer.param_groups[0]["lr"] = config.lr * lr_factor(config, step, config.steps or 0, 0.0)
        loss = model(**completion(batch, model.device).inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model


def batches(train: list[Example], config: deltaw.TrainConfig) -> Iterator[Any]:
    order = Order([len(e.input_ids) for e in train], batch=config.batch, seed=config.seed)
    for step in range(config.steps or 0):
        yield collate([train[i] for i in order.at(step)], 0)


@torch.no_grad()
def held_out_loss(model: Any, examples: list[Example]) -> float:
    """Per supervised token, by the model's own logits."""
    model.eval()
    total, count = 0.0, 0
    for at in range(0, len(examples), 8):
        batch = collate(examples[at : at + 8], 0)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        wanted = batch.supervised[:, 1:]
        total += float(F.cross_entropy(logits[wanted], batch.input_ids[:, 1:][wanted], reduction="sum"))
        count += int(wanted.sum())
    return total / count


if __name__ == "__main__":
    main()
