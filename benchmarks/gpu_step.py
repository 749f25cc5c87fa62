"""Measure a training step on a GPU: deltaw, a plain PEFT loop, full fine-tuning where it fits, and the floor.

    python benchmarks/gpu_step.py                          # Llama-3.2-1B's and Llama-3.1-8B's shapes
    python benchmarks/gpu_step.py --shape tiny --name tmp  # anywhere: does it run?

The weights are random, in bfloat16, built on the device: a step's cost does not depend on their values. Every record has the
same length, and its second half is supervised. Rows are those of train_step.py. A turn is ten steps, so that nothing waits
for the GPU between them. Writes results/gpu_step.json: tokens/s and peak memory, with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass
from typing import Any

import race
from race import Clock
from shapes import LLAMA, random_llama

SEED = 0


@dataclass(frozen=True)
class Case:
    """One heat."""

    shape: str
    rows: tuple[str, ...]
    rank: int = 8
    batch: int = 8
    length: int = 512
    warm: int = 2
    """Turns that only warm up."""
    turns: int = 6
    each: int = 10
    """Steps of a turn."""


CASES = (
    Case("llama-3.2-1b", ("deltaw", "floor", "peft_loop", "full")),
    Case("llama-3.2-1b", ("deltaw", "floor", "peft_loop"), rank=64),
    Case("llama-3.1-8b", ("deltaw", "floor"), batch=4),
    Case("llama-3.1-8b", ("deltaw", "peft_loop"), batch=4),
    Case("llama-3.1-8b", ("deltaw", "floor"), batch=4, rank=64),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=LLAMA, help="this shape only")
    parser.add_argument("--name", default="gpu_step", help="of the result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        race.work(chosen.worker, ROWS, lambda given: Case(**given))
        return
    import machine

    tiny = Case("tiny", ("deltaw", "floor", "peft_loop", "full"), length=64, warm=1, turns=2, each=2)
    cases = [case for case in (*CASES, tiny) if case.shape == (chosen.shape or case.shape)]
    found = []
    for case in cases if chosen.shape else CASES:
        rows = race.heat(case.rows, asdict(case), warm=case.warm, count=case.turns, each=case.each)
        found.append(asdict(case) | {"rows": rows})
        print(json.dumps(found[-1], indent=1), file=sys.stderr, flush=True)
    machine.write(chosen.name, {"heats": found})


# --- rows -------------------------------------------------------------------------------------------------------


def deltaw_row(case: Case, clock: Clock) -> None:
    """The loop that `deltaw.train` runs."""
    import deltaw
    from deltaw.training.loop import LoopPlan, LoopState, drawing, opened, take_step
    from deltaw.training.losses import CompletionLoss

    model = random_llama(case.shape, seed=SEED)
    deltaw.attach(model, deltaw.LoRA(rank=case.rank, alpha=16))
    steps = (case.warm + case.turns) * case.each
    config = deltaw.TrainConfig(lr=5e-4, batch=case.batch, steps=steps, log_every=1, seed=SEED)
    supervised = case.batch * (case.length - case.length // 2)

    clock.start()
    with opened(LoopPlan(CompletionLoss(model), records(case), (), config), LoopState()) as loop:
        while loop.goes_on:
            with drawing(loop):
                take_step(loop)
            clock.step(case.batch * case.length, supervised, loop.losses / supervised)
            loop.losses.zero_()  # no line of the log, which would read it from the GPU: a run logs every tenth step


def floor_row(case: Case, clock: Clock) -> None:
    """Forward and activation gradients through the frozen base, with deltaw's loss."""
    from deltaw.training.losses import CompletionLoss
    from rows import floor

    model = floor(random_llama(case.shape, seed=SEED)).train()
    loss = CompletionLoss(model)
    clock.start()
    for batch in batches(case):
        total, count = loss(batch)
        (total / count).backward()
        clock.step(batch.input_ids.numel(), count, total.detach() / count)


def peft_row(case: Case, clock: Clock) -> None:
    import peft

    config = peft.LoraConfig(r=case.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    own_loss(case, clock, peft.get_peft_model(random_llama(case.shape, seed=SEED), config))


def full_row(case: Case, clock: Clock) -> None:
    own_loss(case, clock, random_llama(case.shape, seed=SEED))


def own_loss(case: Case, clock: Clock, model: Any) -> None:
    """The model's own loss, AdamW."""
    from rows import completion, plain_loop

    plain_loop(clock, model, (completion(batch, model.device) for batch in batches(case)), lr=1e-4)


ROWS = {"deltaw": deltaw_row, "floor": floor_row, "peft_loop": peft_row, "full": full_row}


def records(case: Case) -> list[Any]:
    """Random tokens; the loop takes them in batches."""
    from deltaw.data import Example

    chance = random.Random(SEED)
    half = case.length // 2
    supervised = [False] * half + [True] * (case.length - half)
    tokens = range(3, LLAMA[case.shape]["vocab_size"])
    return [Example(chance.choices(tokens, k=case.length), supervised, f"random:{i}") for i in range(8 * case.batch)]


def batches(case: Case) -> Any:
    from deltaw.data import collate

    examples = records(case)
    for number in range((case.warm + case.turns) * case.each):
        at = number * case.batch % len(examples)
        yield collate(examples[at : at + case.batch], 0)


if __name__ == "__main__":
    main()
