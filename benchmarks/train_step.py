"""What a training step costs: deltaw, TRL, a plain PEFT loop, full fine-tuning and the floor, on the same records.

    python benchmarks/train_step.py --data DATA/e2e                     # all-linear, r = 8, 8 records a step
    python benchmarks/train_step.py --data DATA/e2e --targets qv --rank 64 --batch 32 --rows deltaw,floor --name other

The floor is a frozen forward pass and a backward pass for activations only, on deltaw's batches in deltaw's precision: no
method that trains through this base can do less. Every row runs in a process of its own, all rows in turn, several rounds;
medians are written, with ratios taken within each round. Tokens are those of the records: padding does not count.

Writes results/NAME.json with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEED = 0


@dataclass
class Clock:
    """What a row's steps came to; the first `warm` of them only warm up."""

    warm: int
    stamps: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loaded: int = 0
    """Resident bytes once the model was there."""

    def start(self) -> None:
        self.loaded = _resident()
        self.stamps.append(time.perf_counter())

    def step(self, tokens: int, supervised: int, loss: float) -> None:
        self.stamps.append(time.perf_counter())
        self.tokens.append(tokens)
        self.supervised.append(supervised)
        self.losses.append(loss)

    def figures(self) -> dict[str, Any]:
        seconds = self.stamps[-1] - self.stamps[self.warm]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "tokens_per_second": sum(self.tokens[self.warm :]) / seconds,
            "supervised_per_second": sum(self.supervised[self.warm :]) / seconds,
            "seconds_per_step": seconds / (len(self.stamps) - 1 - self.warm),
            "seconds_per_token": seconds / sum(self.tokens[self.warm :]),
            "peak_over_loaded_gb": (peak - self.loaded) / 1e9,
            "losses": [round(loss, 4) for loss in self.losses],
        }


def main() -> None:
    chosen = arguments()
    if chosen.worker:
        print(json.dumps(work(chosen)))
        return
    import machine

    rows = chosen.rows.split(",")
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        sample(Path(chosen.data) / "train.jsonl", Path(folder) / "train.jsonl")
        for number in range(chosen.rounds):
            rounds.append({})
            for row in rows if number % 2 == 0 else reversed(rows):  # what runs first in a round takes turns
                rounds[-1][row] = run_worker(row, folder)
                shown = {k: round(v, 3) for k, v in rounds[-1][row].items() if k != "losses"}
                print(number, row, shown, file=sys.stderr, flush=True)
    settings = {k: v for k, v in vars(chosen).items() if k not in ("worker", "data", "model")}
    machine.write(chosen.name, {"settings": settings, "rows": {row: summary(rounds, row, rows) for row in rows}})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.jsonl of prompt/completion records")
    parser.add_argument("--model", default=str(HERE.parent / ".cache" / "smollm2"))
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="auto", help="deltaw's and the floor's; the others take their own defaults")
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--name", default="train_step")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def sample(source: Path, out: Path) -> None:
    """The same few thousand records for every row: a step's cost needs no more, and reading them is not measured."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(random.Random(SEED).sample(lines, min(4000, len(lines)))), encoding="utf-8")


def run_worker(row: str, folder: str) -> dict[str, Any]:
    """One row in a fresh process, which prints its figures last."""
    command = [sys.executable, __file__, *sys.argv[1:], "--data", folder, "--worker", row]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | quiet)
    return json.loads(done.stdout.splitlines()[-1])


def work(chosen: argparse.Namespace) -> dict[str, Any]:
    clock = Clock(chosen.warm)
    ROWS[chosen.worker](chosen, clock)
    return clock.figures()


def summary(rounds: list[dict[str, Any]], row: str, rows: list[str]) -> dict[str, Any]:
    """Medians over rounds, and the median ratio of its time per token to every other row's in the same round."""
    keys = [k for k in rounds[0][row] if k not in ("losses", "seconds_per_token")]
    found: dict[str, Any] = {k: round(statistics.median(r[row][k] for r in rounds), 4) for k in keys}
    found["times_the_time_of"] = {
        other: round(statistics.median(r[row]["seconds_per_token"] / r[other]["seconds_per_token"] for r in rounds), 3)
        for other in rows
        if other != row
    }
    return found | {"losses": rounds[0][row]["losses"]}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- rows -------------------------------------------------------------------------------------------------------


def deltaw_row(chosen: argparse.Namespace, clock: Clock) -> None:
    """`deltaw.train` as a user calls it."""
    import deltaw

    counted = [0, 0]

    def hear(event: Any) -> None:
        if event.kind == "start":
            clock.start()
        elif event.kind == "step":
            tokens, supervised = event.values["tokens"], event.values["supervised"]
            clock.step(tokens - counted[0], supervised - counted[1], event.values["loss"])
            counted[:] = tokens, supervised

    with tempfile.TemporaryDirectory() as folder:
        config = deltaw.TrainConfig(
            out=folder, batch=chosen.batch, steps=chosen.warm + chosen.steps, valid_share=0.0, samples=0, log_every=1,
            seed=SEED, dtype=chosen.dtype, overwrite=True,
        )  # fmt: skip
        method = deltaw.LoRA(rank=chosen.rank, alpha=16, targets=chosen.targets)
        deltaw.train(chosen.model, str(Path(chosen.data) / "train.jsonl"), config, method=method, on_event=hear)


def floor_row(chosen: argparse.Namespace, clock: Clock) -> None:
    """Forward and activation gradients through the frozen base on deltaw's own batches."""
    from deltaw.training.attention import short_row_attention
    from deltaw.training.loss import CompletionLoss

    model, tokenizer, examples = opened(chosen, dtype=chosen.dtype)
    model.requires_grad_(False).train()
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    loss = CompletionLoss(model)
    with short_row_attention(model, max(len(e.input_ids) for e in examples)):
        clock.start()
        for rows, batch in planned(chosen, tokenizer, examples):
            total, count = loss(batch)
            (total / count).backward()
            clock.step(sum(len(e.input_ids) for e in rows), count, float(total) / count)


def peft_row(chosen: argparse.Namespace, clock: Clock) -> None:
    """The loop of PEFT's own examples: shuffled, padded batches, the model's own loss, AdamW."""
    import peft

    model, tokenizer, examples = opened(chosen)
    modules: Any = ["q_proj", "v_proj"] if chosen.targets == "qv" else "all-linear"
    config = peft.LoraConfig(r=chosen.rank, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM")
    plain_loop(chosen, clock, peft.get_peft_model(model, config), tokenizer, examples)


def full_row(chosen: argparse.Namespace, clock: Clock) -> None:
    """The same loop over all weights."""
    plain_loop(chosen, clock, *opened(chosen))


def plain_loop(chosen: argparse.Namespace, clock: Clock, model: Any, tokenizer: Any, examples: list[Any]) -> None:
    import torch

    from deltaw.data import collate

    order = list(range(len(examples)))
    random.Random(SEED).shuffle(order)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-4 if len(trainable) < len(list(model.parameters())) else 5e-5)
    model.train()
    clock.start()
    for number in range(chosen.warm + chosen.steps):
        rows = [examples[i] for i in order[number * chosen.batch : (number + 1) * chosen.batch]]
        batch = collate(rows, tokenizer.pad_token_id or 0)
        labels = batch.input_ids.masked_fill(~batch.supervised, -100)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step(int(batch.attention_mask.sum()), int(batch.supervised.sum()), float(loss.detach()))


def trl_row(**settings: Any) -> Callable[[argparse.Namespace, Clock], None]:
    """TRL's SFTTrainer with PEFT, as its documentation shows it, and these settings."""

    def row(chosen: argparse.Namespace, clock: Clock) -> None:
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
        model = AutoModelForCausalLM.from_pretrained(chosen.model)
        tokenizer = AutoTokenizer.from_pretrained(chosen.model)
        lines = (Path(chosen.data) / "train.jsonl").read_text().splitlines()
        data = datasets.Dataset.from_list([json.loads(line) for line in lines])
        modules: Any = ["q_proj", "v_proj"] if chosen.targets == "qv" else "all-linear"
        with tempfile.TemporaryDirectory() as folder:
            config = trl.SFTConfig(
                output_dir=folder, per_device_train_batch_size=chosen.batch, max_steps=chosen.warm + chosen.steps,
                logging_steps=1, save_strategy="no", report_to="none", seed=SEED, learning_rate=5e-4, use_cpu=True, **settings,
            )  # fmt: skip
            trainer = trl.SFTTrainer(
                model=model, args=config, train_dataset=data, processing_class=tokenizer,
                peft_config=peft.LoraConfig(r=chosen.rank, lora_alpha=16, target_modules=modules),
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
    "floor": floor_row,
    "trl": trl_row(),
    "trl_grouped": trl_row(train_sampling_strategy="group_by_length"),
    "trl_packed": trl_row(packing=True, max_length=1024),
    "trl_tuned": trl_row(train_sampling_strategy="group_by_length", gradient_checkpointing=False),
    "peft_loop": peft_row,
    "full": full_row,
}


def opened(chosen: argparse.Namespace, dtype: str = "float32") -> tuple[Any, Any, list[Any]]:
    """Model, tokenizer and encoded records."""
    from deltaw.config import DataConfig
    from deltaw.data import encode, read
    from deltaw.pretrained import load_pretrained

    loaded = load_pretrained(chosen.model, dtype=dtype, to_train=True)  # type: ignore[arg-type]
    records = read(str(Path(chosen.data) / "train.jsonl"), DataConfig())
    return loaded.model, loaded.tokenizer, encode(records, loaded.tokenizer, DataConfig()).examples


def planned(chosen: argparse.Namespace, tokenizer: Any, examples: list[Any]) -> Any:
    """deltaw's batches: the same plan, padding and order."""
    from deltaw.data import collate, plan
    from deltaw.generation import pad_id

    batches = plan([len(e.input_ids) for e in examples], chosen.batch, SEED, 0)
    for indices in batches[: chosen.warm + chosen.steps]:
        rows = [examples[i] for i in indices]
        yield rows, collate(rows, pad_id(tokenizer))


if __name__ == "__main__":
    main()
