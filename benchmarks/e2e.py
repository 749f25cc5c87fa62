"""Fine-tune SmolLM2-135M on E2E NLG and score all 630 test items with all their references, base and adapter.

    python benchmarks/e2e.py --data DATA/e2e --beams 4                                 # within the hour
    python benchmarks/e2e.py --data DATA/e2e --race                                    # deltaw, then TRL + PEFT, on 5,600 records
    python benchmarks/e2e.py --data DATA/e2e --race --no-trl --records 8000 --name e2e_minutes    # deltaw alone, for longer
    python benchmarks/e2e.py --data DATA/e2e --beams 4 --run runs/e2e                  # score a finished run again

Writes results/NAME.json: BLEU (sacrebleu, lower-cased, 13a, unsmoothed) and ROUGE-L with 95% intervals, greedy and by beam
search. With them stand held-out loss, training time, tokens/s, peak memory, machine and versions.

Train and held-out data are DATA's. Of the learning rates 5e-4 and 1e-3 the one with the lower held-out loss was taken. The beam
search has the length penalty that LoRA's authors publish for E2E (0.8, with 10 beams), fixed before the committed run. Adapters
of earlier runs had been scored on the test items with penalties 0.0, 1.0 and 1.5: 66.2, 66.7 and 65.0. For comparison, the
paper's GPT-2 M (355M, 5 epochs, beam 10): full fine-tuning 68.2, LoRA 70.4.

The race gives both the same records, batch, r, α, learning rate and schedule, in turn, once for each seed. TRL has the settings
that are fastest for it in results/train_step.json. All adapters are scored by the same code, greedily, and by the loss of the
first 500 records of valid.jsonl: BLEU moves by a point from one seed to another.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

import deltaw
import machine
from deltaw.cli import show
from deltaw.cli.opening import as_trained
from deltaw.config import from_mapping
from deltaw.data import read
from deltaw.model.pretrained import Pretrained, load_pretrained
from deltaw.model.switch import using
from deltaw.runs.evaluation.evaluate import Evaluation, evaluate
from train_step import TRL_FASTEST

HERE = Path(__file__).resolve().parent
METRICS = ("bleu", "rouge_l")
LENGTH_PENALTY = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.jsonl, valid.jsonl and test.jsonl of E2E")
    parser.add_argument("--model", default=str(HERE.parent / ".cache" / "smollm2"))
    parser.add_argument(
        "--records", type=int, help="training records, a seeded random sample; default: all that the time allows"
    )
    parser.add_argument("--lr", type=float, help="peak learning rate; default: that of e2e.yaml")
    parser.add_argument("--beams", type=int, default=1, help="above 1: beam search too, beside greedy decoding")
    parser.add_argument("--base", action=argparse.BooleanOptionalAction, default=True, help="score the base as well")
    parser.add_argument("--run", help="score the adapter of this finished run instead of training one")
    parser.add_argument("--race", action="store_true", help="minutes and BLEU of deltaw and of TRL + PEFT")
    parser.add_argument("--seeds", type=int, default=2, help="of the race")
    parser.add_argument("--trl", action=argparse.BooleanOptionalAction, default=True, help="TRL + PEFT in the race")
    parser.add_argument("--name", default="e2e", help="of the result file and the run folder")
    chosen = parser.parse_args()
    show.quiet_libraries()
    if chosen.race:
        race(chosen)
        return
    folder = Path(chosen.run) if chosen.run else train(chosen)
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    figures = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    loop = figures["loop"]
    words = " ".join(sys.argv[1:]).replace(chosen.data, "DATA/e2e").replace(chosen.model, "SMOLLM2")
    machine.write(
        chosen.name,
        {
            "command": f"python benchmarks/e2e.py {words}",
            "settings": {k: v for k, v in settings.items() if k not in ("model", "data", "out")},
            "items": 630,
            "length_penalty_of_beams": LENGTH_PENALTY if chosen.beams > 1 else None,
            "scores": scores(
                chosen, adapted(chosen, folder / "adapter"), as_trained(deltaw.DataConfig(), str(folder / "adapter"))
            ),
            "minutes_of_training": loop["seconds"] / 60,
            "tokens_per_second": loop["tokens"] / loop["step_seconds"],
            "steps": loop["step"],
            "records": loop["records"],
            "tokens": loop["tokens"],
            "supervised_tokens": loop["supervised"],
            "peak_memory_gb": figures["peak_memory"] / 1e9,
            "adapter_mb": figures["adapter_bytes"] / 1e6,
            "relative_norm": figures["relative_norm"],
            "held_out_loss": [line["valid_loss"] for line in log if line["event"] == "eval"],
        },
    )


def race(chosen: argparse.Namespace) -> None:
    """deltaw and TRL + PEFT on the same records, and what each came to in how many minutes."""
    records, lr = chosen.records or 5600, chosen.lr or 5e-4
    data = Path(chosen.data)
    rows: dict[str, list[dict[str, Any]]] = {"deltaw": []} | ({"TRL + PEFT": []} if chosen.trl else {})
    name = "e2e_race" if chosen.name == "e2e" else chosen.name
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "valid", "test"):
            lines = (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            lines = random.Random(0).sample(lines, records) if split == "train" else lines
            (Path(folder) / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        here = argparse.Namespace(
            **vars(chosen) | {"data": folder, "records": None, "lr": lr, "name": name, "beams": 1, "base": False}
        )
        for seed in range(chosen.seeds):
            run = train(here, minutes=None, eval_every=10**6, seed=seed)
            figures = json.loads((run / "result.json").read_text(encoding="utf-8"))
            prompts = as_trained(deltaw.DataConfig(), str(run / "adapter"))
            ours = {"minutes": figures["loop"]["seconds"] / 60, "peak_memory_gb": figures["peak_memory"] / 1e9}
            rows["deltaw"].append(ours | race_scores(here, run / "adapter", prompts))
            if chosen.trl:
                # In a process of its own, for its memory's sake
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    theirs = pool.apply(train_trl, (chosen.model, folder, lr, seed))
                rows["TRL + PEFT"].append(theirs | race_scores(here, Path(folder) / "trl", prompts))
            print(json.dumps(rows, indent=1), file=sys.stderr, flush=True)
    machine.write(name, {"records": records, "batch": 8, "rank": 8, "alpha": 16, "lr": lr, "items": 630, "rows": rows})


def train_trl(model_folder: str, folder: str, lr: float, seed: int) -> dict[str, float]:
    """TRL's SFTTrainer with PEFT on FOLDER/train.jsonl; leaves its adapter in FOLDER/trl."""
    import datasets
    import peft
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = (Path(folder) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["prompt"] += "\n"  # e2e.yaml's separator
    config = trl.SFTConfig(
        output_dir=str(Path(folder) / "trl-run"), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=lr,
        lr_scheduler_type="linear", warmup_steps=0.03, save_strategy="no", report_to="none", use_cpu=True, seed=seed,
        **TRL_FASTEST,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype="bfloat16"),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    began = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - began) / 60
    trainer.model.save_pretrained(str(Path(folder) / "trl"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return {"minutes": minutes, "peak_memory_gb": peak / 1e9}


def train(chosen: argparse.Namespace, **more: Any) -> Path:
    """Train as e2e.yaml and the flags say; returns the run folder."""
    settings = yaml.safe_load((HERE / "e2e.yaml").read_text(encoding="utf-8"))
    settings |= {"lr": chosen.lr} if chosen.lr is not None else {}
    settings |= {
        "max_records": chosen.records,
        "out": str(HERE.parent / "runs" / chosen.name),
        "overwrite": True,
    } | more
    method_keys = {f.name for f in dataclasses.fields(deltaw.LoRA)}
    method = from_mapping(deltaw.LoRA, {k: v for k, v in settings.items() if k in method_keys})
    config = from_mapping(deltaw.TrainConfig, {k: v for k, v in settings.items() if k not in method_keys})
    return deltaw.train(chosen.model, chosen.data, config, method=method).folder


def race_scores(chosen: argparse.Namespace, adapter: Path, data: deltaw.DataConfig) -> dict[str, Any]:
    valid = read(chosen.data, data, split="valid")
    some = dataclasses.replace(valid, items=valid.items[:500])
    fresh = adapted(chosen, adapter)
    loss = evaluate(fresh.model, fresh.tokenizer, some, data, deltaw.GenerateConfig(), metrics=("loss",)).scores["loss"]
    return scores(chosen, fresh, data) | {"held_out_loss": [round(v, 4) for v in loss.plain().values()]}


def adapted(chosen: argparse.Namespace, adapter: Path) -> Pretrained:
    """The adapter's files on a freshly loaded base, as `deltaw eval` has them."""
    fresh = load_pretrained(chosen.model)
    deltaw.load(fresh.model, adapter)
    return fresh


def scores(chosen: argparse.Namespace, fresh: Pretrained, data: deltaw.DataConfig) -> dict[str, Any]:
    records = read(chosen.data, data, split="test")
    decodings = {"greedy": deltaw.GenerateConfig(max_new_tokens=96, batch=32)}
    if chosen.beams > 1:
        decodings[f"{chosen.beams} beams"] = deltaw.GenerateConfig(
            max_new_tokens=96, batch=16, beams=chosen.beams, length_penalty=LENGTH_PENALTY
        )
    found = {
        f"adapter, {name}": score(fresh, records, data, decoding, "default") for name, decoding in decodings.items()
    }
    if chosen.base:
        found["base, greedy"] = score(fresh, records, data, decodings["greedy"], None)
    return found


def score(loaded: Any, records: Any, data: Any, decoding: Any, adapter: str | None) -> dict[str, Any]:
    """Scores of one decoding as plain values."""
    with using(loaded.model, adapter):
        found: Evaluation = evaluate(loaded.model, loaded.tokenizer, records, data, decoding, metrics=METRICS)
    assert found.items == 630, f"expected the 630 items of the test split, got {found.items}"
    plain = {name: [round(v, 4) for v in value.plain().values()] for name, value in found.scores.items()}
    return plain | {"minutes": round(found.seconds / 60, 2), "first": found.predictions[:3]}


if __name__ == "__main__":
    main()
