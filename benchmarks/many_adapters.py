"""Measure a batch whose rows go through different adapters: a decode step and a short prefill, over the base's time.

    python benchmarks/many_adapters.py --model .cache/smollm2
    python benchmarks/many_adapters.py --shape llama-3.2-1b --dtype bfloat16 --name many_adapters_gpu    # on a GPU

For q,v and all-linear at r = 8 there are growing numbers of adapters, and as many rows. In turn run the base, deltaw's route,
deltaw with all rows through one adapter, and PEFT's adapter_names; results are medians. Decoding runs several steps with one
making of the stacks, as `generate` does. Before anything is timed, each row's logits are compared with that row's alone.
`rounding` is ‖ΔW − ΔW'‖ / ‖ΔW‖ of an adapter in the precision in which it is stored. Writes results/many_adapters.json, and its
curves as many_adapters.html, which is not kept in the repository.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import deltaw
import machine
from adapters import attach_random
from deltaw.model.record import record_of
from deltaw.runs.reports.charts import Chart, Series
from deltaw.runs.reports.page import Report, write
from race import synchronize
from shapes import LLAMA, random_llama

TARGETS = {"q,v": "q,v", "all-linear": "all-linear"}
CACHED, PREFILL = 64, 16
# Of decoding, in one turn
STEPS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--shape", choices=LLAMA, help="random weights of this shape instead, on a GPU if there is one")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peft", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--peft-most", type=int, default=64, help="adapters that PEFT loads, each more slowly than the last"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--store", choices=["float32", "bfloat16"], help="of A and B; default: float32")
    parser.add_argument("--name", default="many_adapters", help="of the result file")
    chosen = parser.parse_args()
    rows = [row for name in TARGETS for row in measure(chosen, name)]
    machine.write(chosen.name, {
        "model": f"random weights, {chosen.shape}" if chosen.shape else "SmolLM2-135M-Instruct",
        "dtype": chosen.dtype, "store": chosen.store or "float32",
        "rank": 8, "cached_tokens": CACHED,
        "prefill_tokens": PREFILL, "ratios": "over the base's time on the same rows", "rows": rows,
    })  # fmt: skip
    series = [Series(f"{t}, {tool}", curve(rows, t, tool), "line") for t in TARGETS for tool in ("deltaw", "peft")]
    chart = Chart(
        "A decode step with an adapter for each row", "adapters, as many rows", "over the base's time", series
    )
    headline = "What a decode step costs when each row of the batch has an adapter of its own"
    write(Report("Many adapters in one batch", headline, curves=[chart]), machine.RESULTS / f"{chosen.name}.html")


def curve(rows: list[dict[str, Any]], targets: str, tool: str) -> list[tuple[float, float]]:
    """Number of adapters → a decode step over the base's."""
    return [(r["adapters"], r["decode"][tool]) for r in rows if r["targets"] == targets and tool in r["decode"]]


@torch.no_grad()
def measure(chosen: argparse.Namespace, targets: str) -> list[dict[str, Any]]:
    """The rows of one set of targets."""
    dtype = getattr(torch, chosen.dtype)
    if chosen.shape:
        model = random_llama(chosen.shape, dtype).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=dtype).eval()
    twin = copy.deepcopy(model) if chosen.peft else None
    names = [f"task{i:03}" for i in range(max(chosen.counts))]
    theirs: Any = None
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(model, targets, names, Path(folder))
        for name in names:
            deltaw.load(
                model,
                Path(folder) / name,
                name=name,
                activate=False,
                dtype=chosen.store and getattr(torch, chosen.store),
            )
            if twin is not None and name in names[: chosen.peft_most]:
                path = str(Path(folder) / name)
                if theirs is None:
                    theirs = peft.PeftModel.from_pretrained(twin, path, adapter_name=name)
                else:
                    theirs.load_adapter(path, adapter_name=name)
    if theirs is not None:
        theirs.eval()
    return [
        count_row(model, theirs if count <= chosen.peft_most else None, names[:count], targets, chosen.rounds)
        for count in chosen.counts
    ]


def make_adapters(model: Any, targets: str, names: list[str], folder: Path) -> None:
    for i, name in enumerate(names):
        attach_random(model, name=name, targets=TARGETS[targets], seed=i, size=0.02)
        deltaw.save(model, folder / name, name=name)
        deltaw.detach(model, name)


def count_row(model: Any, theirs: Any, names: list[str], targets: str, rounds: int) -> dict[str, Any]:
    """One number of adapters, a row of the batch for each."""
    n = len(names)
    generator = torch.Generator().manual_seed(n)
    prompt = torch.randint(100, min(40000, model.config.vocab_size), (n, CACHED), generator=generator).to(model.device)
    apart = largest_difference(model, names, prompt[:, :8])
    times = {"decode": ratios(rows(model, theirs, names, prompt[:, :1], prompt), rounds, STEPS)}
    times["prefill"] = ratios(rows(model, theirs, names, prompt[:, :PREFILL], None), rounds, 1)
    row = {"targets": targets, "adapters": n, **times, "largest_logit_difference_from_alone": apart}
    row["rounding"] = deltaw.summary(model).adapters[names[0]].rounding
    print(row, flush=True)
    return row


def rows(
    model: Any, theirs: Any, names: list[str], ids: torch.Tensor, before: torch.Tensor | None
) -> dict[str, Callable[[], None]]:
    """What is timed: a pass over `ids`, or after a cache of `before` some steps of it."""

    def through(one: Any, **more: Any) -> Callable[[], None]:
        if before is None:
            return lambda: one(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1, **more)
        cache = DynamicCache()
        one(before, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)

        def steps() -> None:
            for _ in range(STEPS):
                one(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
                cache.crop(-ids.shape[1])

        return steps

    def base() -> None:
        with deltaw.using(model, None):
            plain()

    def routed() -> None:
        with deltaw.route(model, names), record_of(model).route.pinned():
            plain()

    def single() -> None:
        with deltaw.using(model, names[0]):
            plain()

    plain = through(model)
    found = {"base": base, "deltaw": routed, "one adapter": single}
    if theirs is not None:
        found["peft"] = through(theirs, adapter_names=names)
    return found


def ratios(turns: dict[str, Callable[[], None]], rounds: int, steps: int) -> dict[str, float]:
    """Medians over interleaved rounds: the base's in milliseconds a step, the others' over the base of the same round."""
    for turn in turns.values():
        turn()
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            began = time.perf_counter()
            turn()
            synchronize()
            taken[name].append(time.perf_counter() - began)
    found = {"base_ms": statistics.median(taken["base"]) / steps * 1000}
    for name, own in taken.items():
        if name != "base":
            found[name] = statistics.median(t / b for t, b in zip(own, taken["base"], strict=True))
    return found


def largest_difference(model: Any, names: list[str], ids: torch.Tensor) -> float:
    """Over the largest logit: of a row in the mixed batch from that row alone, at up to eight rows."""
    with deltaw.route(model, names):
        mixed = model(ids, logits_to_keep=1).logits
    worst = 0.0
    for i in range(0, len(names), max(1, len(names) // 8)):
        with deltaw.using(model, names[i]):
            own = model(ids[i : i + 1], logits_to_keep=1).logits[0]
        worst = max(worst, float((mixed[i] - own).abs().max() / own.abs().max()))
    return worst


if __name__ == "__main__":
    main()
