"""Measure a training step: deltaw, TRL, a plain PEFT loop, full fine-tuning and the floor, on the same records.

    python benchmarks/train_step.py --data DATA/e2e                  # all-linear, r = 8, 8 records a step, against the others
    python benchmarks/train_step.py --data DATA/e2e --part grid      # against the floor: ranks and batches; grid_qv: of q,v
    python benchmarks/train_step.py --data DATA/e2e --part ranks     # … by rank, and with --part lengths by record length
    python benchmarks/train_step.py --data DATA/e2e --rows deltaw,floor --rank 64 --name other
    python benchmarks/train_step.py --data DATA/e2e --part float32 --against CHECKOUT   # beside the deltaw of another checkout

The floor is a frozen forward pass and a backward pass for activations only, on deltaw's batches in deltaw's precision, with
deltaw's loss and attention. No method that trains through this base can do less. Rows run side by side, step by step (race.py).
Tokens are those of the records: padding does not count.

Writes results/train_step.json (…_PART.json) with machine and versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import race
from race import Clock

HERE = Path(__file__).resolve().parent
SEED = 0
TRL_FASTEST: dict[str, Any] = {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False}
"""TRL's settings beside the precision that take the least time here."""


@dataclass(frozen=True)
class Case:
    """One heat: these rows, side by side, on steps like these."""

    rows: tuple[str, ...] = ("deltaw", "floor")
    targets: str = "all-linear"
    rank: int = 8
    batch: int = 8
    length: int = 0
    """Tokens of a record, about: records are joined up to there; 0 takes them as they are."""
    dtype: str = "auto"
    """deltaw's and the floor's; the others take their own defaults."""
    warm: int = 25
    """Steps before those that count: a CPU's kernels are made anew for each width of a batch."""
    steps: int = 20


def _grid(targets: str) -> list[Case]:
    return [
        Case(targets=targets, rank=rank, batch=batch, warm=warm, steps=steps)
        for rank in (1, 8, 64)
        for batch, warm, steps in ((1, 40, 60), (8, 25, 20), (32, 12, 8))
    ]


PARTS: dict[str, list[Case]] = {
    "main": [
        Case(rows=("deltaw", "floor", "trl", "trl_grouped"), warm=15),
        Case(rows=("deltaw", "trl_tuned", "trl_bfloat16", "peft_loop", "full"), warm=15),
        Case(rows=("trl_packed",), warm=1, steps=2),  # a step of it is 8,192 tokens and 17 GB: it has the machine to itself
    ],
    "grid": _grid("all-linear"),
    "grid_qv": _grid("qv"),
    "ranks": [Case(rank=rank) for rank in (1, 2, 4, 8, 16, 32, 64, 128)],
    "lengths": [
        Case(length=length, batch=batch, warm=4, steps=8) for length, batch in ((64, 16), (128, 8), (256, 4), (512, 2), (1024, 1))
    ],
    "checkpointing": [
        Case(rows=("deltaw", "deltaw_checkpointing"), length=length, batch=batch, warm=4, steps=8)
        for length, batch in ((0, 8), (512, 4))
    ],
    # States by time, as by default, and a state after each step, beside none: 0.99 of the tokens/s is what is promised
    "states": [Case(rows=("deltaw", "deltaw_unsaved"), warm=6, steps=60)],
    "float32": [
        Case(rows=("deltaw", "floor", "peft_loop"), targets=targets, rank=rank, dtype="float32", warm=10)
        for targets, rank in (("all-linear", 8), ("qv", 8), ("all-linear", 64))
    ],
}  # fmt: skip


def main() -> None:
    chosen = arguments()
    if chosen.worker:
        race.work(chosen.worker, ROWS, lambda given: Job(Case(**given["case"]), given["data"], given["model"]))
        return
    if not chosen.data:
        sys.exit("--data: the folder with E2E's train.jsonl")
    import machine

    known = {f.name for f in dataclasses.fields(Case)}
    changes = {k: v for k, v in vars(chosen).items() if k in known and v is not None}
    if "rows" in changes:
        changes["rows"] = tuple(changes["rows"].split(","))
    # Rows or settings of one's own make one heat of them
    cases = PARTS[chosen.part] if not changes else [Case(**changes)]
    if chosen.against:
        cases = [dataclasses.replace(case, rows=("deltaw", f"deltaw@{chosen.against}")) for case in cases]
    found = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            sample(Path(chosen.data) / "train.jsonl", Path(folder) / "train.jsonl", case.length)
            found.append(dataclasses.asdict(case) | {"rows": heat(case, folder, chosen.model)})
        shown = {row: {k: v for k, v in values.items() if k != "losses"} for row, values in found[-1]["rows"].items()}
        print(json.dumps(found[-1] | {"rows": shown}, indent=1), file=sys.stderr, flush=True)
    part = chosen.part if not changes else "own"
    part += "_against" if chosen.against else ""
    machine.write(chosen.name or ("train_step" if part == "main" else f"train_step_{part}"), {"heats": found})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train.jsonl of prompt/completion records")
    parser.add_argument("--model", default=str(HERE.parent / ".cache" / "smollm2"))
    parser.add_argument("--part", default="main", choices=PARTS)
    parser.add_argument("--rows", help=f"of {', '.join(ROWS)}, with commas between; they make one heat")
    parser.add_argument(
        "--against", metavar="CHECKOUT", help="race the deltaw of another checkout instead of the other rows"
    )
    parser.add_argument("--targets", choices=("all-linear", "qv"))
    for name in ("rank", "batch", "length", "warm", "steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def sample(source: Path, out: Path, length: int) -> None:
    """The same few thousand records for every row: a step's cost needs no more, and reading them is not measured."""
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    random.Random(SEED).shuffle(records)
    if length:
        records = list(joined(records, 4 * length))
    lines = [json.dumps(record) + "\n" for record in records[:4000]]
    out.write_text("".join(lines), encoding="utf-8")


def joined(records: list[dict[str, str]], characters: int) -> Iterator[dict[str, str]]:
    """Records put together, the earlier ones into the last one's prompt, up to about so many characters each."""
    before: list[str] = []
    for record in records:
        if sum(map(len, before)) + len(record["prompt"]) + len(record["completion"]) >= characters:
            yield {"prompt": "\n".join([*before, record["prompt"]]), "completion": record["completion"]}
            before = []
        else:
            before.append(record["prompt"] + "\n" + record["completion"])


def heat(case: Case, folder: str, model: str) -> dict[str, Any]:
    job = {"case": dataclasses.asdict(case), "data": folder, "model": model}
    return race.heat(case.rows, job, warm=case.warm, count=case.steps)


@dataclass(frozen=True)
class Job:
    """What a row gets."""

    case: Case
    data: str
    model: str

    @property
    def steps(self) -> int:
        return self.case.warm + self.case.steps


# --- rows -------------------------------------------------------------------------------------------------------


def deltaw_row(job: Job, clock: Clock, **settings: Any) -> None:
    """`deltaw.train` as a user calls it."""
    import deltaw

    with tempfile.TemporaryDirectory() as folder:
        config = deltaw.TrainConfig(
            out=folder, batch=job.case.batch, steps=job.steps, valid_share=0.0, samples=0, log_every=1,
            lr=5e-4, seed=SEED, dtype=job.case.dtype, overwrite=True,
            data=deltaw.DataConfig(template="plain", separator=""),  # the tokens that the peers train on
            **settings,
        )  # fmt: skip
        method = deltaw.LoRA(rank=job.case.rank, alpha=16, targets=job.case.targets)
        deltaw.train(job.model, str(Path(job.data) / "train.jsonl"), config, method=method, on_event=clock.follow())


def floor_row(job: Job, clock: Clock) -> None:
    """Forward and activation gradients through the frozen base on deltaw's own batches."""
    from deltaw.training.attention import training_attention
    from deltaw.training.losses import CompletionLoss
    from rows import floor

    model, tokenizer, examples = opened(job, dtype=job.case.dtype)
    model = floor(model).train()
    loss = CompletionLoss(model)
    with training_attention(model, max(len(e.input_ids) for e in examples)):
        clock.start()
        for rows, batch in planned(job, tokenizer, examples):
            total, count = loss(batch)
            (total / count).backward()
            clock.step(sum(len(e.input_ids) for e in rows), count, total.detach() / count)


def peft_row(job: Job, clock: Clock) -> None:
    """The loop of PEFT's own examples: shuffled, padded batches, the model's own loss, AdamW."""
    import peft

    model, tokenizer, examples = opened(job)
    modules: Any = ["q_proj", "v_proj"] if job.case.targets == "qv" else "all-linear"
    config = peft.LoraConfig(r=job.case.rank, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM")
    shuffled_loop(job, clock, peft.get_peft_model(model, config), tokenizer, examples, lr=5e-4)


def full_row(job: Job, clock: Clock) -> None:
    """The same loop over all weights."""
    shuffled_loop(job, clock, *opened(job), lr=5e-5)


def shuffled_loop(job: Job, clock: Clock, model: Any, tokenizer: Any, examples: list[Any], lr: float) -> None:
    from deltaw.data import collate
    from rows import completion, plain_loop

    order = list(range(len(examples)))
    random.Random(SEED).shuffle(order)
    chosen = (order[n * job.case.batch : (n + 1) * job.case.batch] for n in range(job.steps))
    batches = (collate([examples[i] for i in indices], tokenizer.pad_token_id or 0) for indices in chosen)
    plain_loop(clock, model, (completion(batch, model.device) for batch in batches), lr)


def trl_row(dtype: str = "float32", **settings: Any) -> Callable[[argparse.Namespace, Clock], None]:
    """TRL's SFTTrainer with PEFT, as its documentation shows it, and these settings."""

    def row(job: Job, clock: Clock) -> None:
        import datasets
        import peft
        import trl
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

        class Stamps(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.start()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if "loss" in logs:
                    clock.step(*seen.pop(0), logs["loss"])

        seen: list[tuple[int, int]] = []
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(job.model)
        lines = (Path(job.data) / "train.jsonl").read_text().splitlines()
        data = datasets.Dataset.from_list([json.loads(line) for line in lines])
        modules: Any = ["q_proj", "v_proj"] if job.case.targets == "qv" else "all-linear"
        with tempfile.TemporaryDirectory() as folder:
            config = trl.SFTConfig(
                output_dir=folder, per_device_train_batch_size=job.case.batch, max_steps=job.steps,
                logging_steps=1, save_strategy="no", report_to="none", seed=SEED, learning_rate=5e-4, use_cpu=True, **settings,
            )  # fmt: skip
            trainer = trl.SFTTrainer(
                model=model, args=config, train_dataset=data, processing_class=tokenizer,
                peft_config=peft.LoraConfig(r=job.case.rank, lora_alpha=16, target_modules=modules),
            )  # fmt: skip
            trainer.add_callback(Stamps())
            step = trainer.training_step

            def counting(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
                mask = inputs.get("attention_mask")
                tokens = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
                seen.append((tokens, int((inputs["labels"] != -100).sum())))
                return step(model, inputs, *rest, **more)

            trainer.training_step = counting
            trainer.train()

    return row


ROWS: dict[str, Callable[[argparse.Namespace, Clock], None]] = {
    "deltaw": deltaw_row,
    "deltaw_checkpointing": partial(deltaw_row, gradient_checkpointing=True),
    "deltaw_unsaved": partial(deltaw_row, save_every=10**9),
    "floor": floor_row,
    "trl": trl_row(),
    "trl_grouped": trl_row(train_sampling_strategy="group_by_length"),
    "trl_packed": trl_row(packing=True, max_length=1024),
    "trl_tuned": trl_row(**TRL_FASTEST),
    "trl_bfloat16": trl_row("bfloat16", **TRL_FASTEST),
    "peft_loop": peft_row,
    "full": full_row,
}


def opened(job: Job, dtype: str = "float32") -> tuple[Any, Any, list[Any]]:
    """Model, tokenizer and encoded records."""
    from deltaw.config import DataConfig
    from deltaw.data import encode, read
    from deltaw.model.pretrained import load_pretrained

    loaded = load_pretrained(job.model, dtype=dtype, to_train=True)  # type: ignore[arg-type]
    records = read(str(Path(job.data) / "train.jsonl"), DataConfig())
    return loaded.model, loaded.tokenizer, encode(records, loaded.tokenizer, DataConfig(template="plain")).examples


def planned(job: Job, tokenizer: Any, examples: list[Any]) -> Any:
    """deltaw's batches: the same plan, padding and order."""
    from deltaw.data import collate, plan
    from deltaw.model.pretrained import pad_id

    batches = plan([len(e.input_ids) for e in examples], job.case.batch, SEED, 0)
    for indices in batches[: job.steps]:
        rows = [examples[i] for i in indices]
        yield rows, collate(rows, pad_id(tokenizer))


if __name__ == "__main__":
    main()
