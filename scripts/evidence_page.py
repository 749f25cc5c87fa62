"""Write docs/evidence.md from results/: methods compared on real data, the cost of their steps, the cost of inference with them.

    python -m scripts.evidence_page

benchmarks/methods_compared.py makes the comparisons, benchmarks/latency.py and benchmarks/methods_step.py the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from deltaw.runs.evaluation.bootstrap import quantile
from deltaw.runs.memory.machine import in_words
from deltaw.runs.reports.compare import COLUMNS, cells, headline, score
from deltaw.runs.results.compare import ComparisonResults
from deltaw.runs.results.scores import SeedScores

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "evidence.md"
# Its file names the CPU on which it was put together; nearly all of its runs were on a GPU
_COLA = (
    "- CoLA was trained on an H100, except two of DoRA's three seeds. Its times are not comparable with the others'."
)
_NORMAL = 1.959964
GLUE = ("sst2", "mrpc", "rte", "cola")
LORA = "lora"
INTRODUCTION = """# Evidence

How full fine-tuning and eight cheaper methods compare on real data, and what each costs. `deltaw compare MODEL DATA` makes the
same table for your model and data. [design.md](design.md) describes each method.

[scripts/evidence_page.py](../scripts/evidence_page.py) writes this page from the files in [results](../results)
(`python -m scripts.evidence_page`). [benchmarks/README.md](../benchmarks/README.md) gives the commands behind those files.

How to read it:

- Every training is short. The tables rank the methods for a small budget; they do not show how far each can come.
- All methods get the same records in the same order, and the same number of steps.
- Learning rates were chosen by held-out records: on E2E and CoLA among several for each method. On the other tasks each method
  has the default of `deltaw compare`.
- Intervals are 95%. On E2E those of losses are over records, though several share a prompt, so they are too narrow; BLEU's are
  over prompts. On GLUE nearly every record is an item, and the intervals include the variance of three seeds, by Student's t.
- ± is the standard deviation over seeds.
- No interval here is of a difference between two methods. These results are from before `deltaw compare` kept each item's part.
  Now it compares methods in pairs.
"""


def of_several(stored: Any) -> Any:
    """Return a score of several seeds with the seeds' variance in its interval.

    The stored interval is the mean of single seeds'. The mean of seeds varies by items at most as much as one seed does.
    """
    seeds, value = stored["seeds"], sum(stored["seeds"]) / len(stored["seeds"])
    if len(seeds) == 1:
        return stored
    a = ((stored["high"] - stored["low"]) / 2 / _NORMAL) ** 2
    b = sum((s - value) ** 2 for s in seeds) / (len(seeds) - 1) / len(seeds)
    half = (a * _NORMAL + b * quantile(0.025, len(seeds) - 1)) / math.sqrt(a + b) if a + b else 0.0
    return {**stored, "value": value, "low": value - half, "high": value + half}


def with_seeds(results: Any) -> Any:
    """Return a comparison's results with such intervals."""
    for row in results["rows"] if results is not None else ():
        row["scores"] = {metric: of_several(stored) for metric, stored in row.get("scores", {}).items()}
    return results


def main() -> None:
    parts = [INTRODUCTION, *e2e(), *rates(), *glue(), *steps(), *latency()]
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


# --- comparisons ------------------------------------------------------------------------------------------------


def e2e() -> list[str]:
    """Return the section on SmolLM2 and E2E."""
    results = read(RESULTS / "compare_e2e.json")
    if results is None:
        return []
    metrics = list(results["rows"][0]["scores"])
    columns = [*COLUMNS, *(f"test {m}" for m in metrics)]
    shown = [i for i, column in enumerate(columns) if column != "step"]  # the runs shared the machine; see steps()
    rows = [
        [texts[i] for i in shown]
        for texts in (cells(row, metrics) for row in ComparisonResults.from_json(results).ranked)
    ]
    return [
        f"## {results['settings']['model']} on {results['settings']['data']}\n",
        budget(results),
        table([columns[i] for i in shown], rows),
        said(results),
    ]


def rates() -> list[str]:
    """Return the section on the learning rates that E2E's methods were tried with."""
    results = read(RESULTS / "rates_e2e.json")
    if results is None:
        return []
    rows = []
    for name, tried in results["methods"].items():
        losses = [t["valid_loss"] for t in tried]
        shown = [f"{t['lr']:g}: {'**' * (t['valid_loss'] == min(losses))}{t['valid_loss']:.3f}" for t in tried]
        rows.append([name, *(f"{text}**" if "**" in text else text for text in shown)])
    width = max(map(len, rows))
    columns = ["method", *["lr: loss"] * (width - 1)]
    table_of = table(columns, [[*row, *[""] * (width - len(row))] for row in rows])
    gpu = results["machine"]["gpu"]
    text = (
        f"{results['what']} ({gpu}). The best one of each is bold; the table above uses it (DoRA took LoRA's). Where it "
        "is the last one tried, a larger one may be better.\n"
    )
    return ["### Learning rates on E2E\n", text, table_of]


def glue() -> list[str]:
    """Return the section on MiniLM and four tasks of GLUE."""
    by_task = {name: results for name in GLUE if (results := with_seeds(read(RESULTS / f"compare_{name}.json")))}
    if not by_task:
        return []
    first = next(iter(by_task.values()))
    by_name = {task: {row["name"]: row for row in results["rows"]} for task, results in by_task.items()}
    columns = ["method", "parameters", *(f"{r['settings']['data']}, {metric_of(r)}" for r in by_task.values())]
    rows = []
    for row in first["rows"]:
        of_tasks = [by_name[task].get(row["name"]) for task in by_task]
        rows.append([row["name"], f"{row['parameters']:,}", *map(of_task, of_tasks, by_task.values())])
    notes = [f"- {r['settings']['data']}: {budget(r, end='')} {said(r, end='')}" for r in by_task.values()]
    notes.append(_COLA)
    return [f"## {first['settings']['model']} on tasks of GLUE\n", table(columns, rows), "\n".join(notes) + "\n"]


def metric_of(results: Any) -> str:
    """Return the metric that ranks the methods."""
    return ComparisonResults.from_json(results).metric


def of_task(row: Any, results: Any) -> str:
    return score(SeedScores.from_json(row["scores"][metric_of(results)])) if row and row.get("scores") else "failed"


def budget(results: Any, end: str = "\n") -> str:
    run, seeds = results["settings"]["run"], len(results["rows"][0]["scores"][metric_of(results)]["seeds"])
    of_seeds = f", {seeds} seeds" if seeds > 1 else ""
    return f"{run['steps']} steps of {run['batch']} records{of_seeds} ({in_words(results['environment'])}).{end}"


def said(results: Any, end: str = "\n") -> str:
    """Return the comparison in words, and LoRA's place in it."""
    metric = metric_of(results)
    typed = ComparisonResults.from_json(results)
    values = {row.name: best.scores[metric].mean for row, best in typed.trained}
    if len(set(values.values())) == 1 or LORA not in values:
        return headline(typed) + end
    better = list(takewhile(lambda name: values[name] != values[LORA], values))
    one = f"{', '.join(better)} {'has' if len(better) == 1 else 'have'} a better figure than {LORA}."
    place = one if better else f"None has a better figure than {LORA}."
    notes = [f"{row['name']}: {note}" for row in results["rows"] for note in row.get("notes", ())]
    return " ".join([headline(typed), place, *notes]) + end


# --- costs ------------------------------------------------------------------------------------------------------


def steps() -> list[str]:
    """Return the section on time and memory of training steps, taken in turn."""
    results = read(RESULTS / "methods_step.json")
    if results is None:
        return []
    rows = [
        [
            name,
            f"{row['seconds_per_step']:.2f} s",
            f"{row['times_the_time_of_lora']:.2f}×",
            f"{row['peak_over_loaded_gb']:.2f} GB",
        ]
        for name, row in results["rows"].items()
    ]
    text = (
        f"{results['model']}, {results['data']}, batches of {results['batch']} records, with the steps of all methods in turn "
        f"({in_words(results['machine'])}). Memory is the peak over the loaded model.\n"
    )
    return ["## What a training step costs\n", text, table(["method", "step", "over LoRA's", "memory"], rows)]


def latency() -> list[str]:
    """Return the section on inference over the base's time, beside the paper's Table 1."""
    results = read(RESULTS / "latency.json")
    if results is None:
        return []
    names = list(results["rows"][0]["ratios"])
    columns = ["", "base", *names, "paper's base", "paper's Houlsby", "paper's Lin"]
    rows = []
    for row in results["rows"]:
        paper = row.get("paper")
        theirs = (
            [f"{paper['rows×tokens']}: {paper['base_ms']} ms", f"{paper['Houlsby']}×", f"{paper['Lin']}×"]
            if paper
            else ["–"] * 3
        )
        size = row.get("rows×tokens") or f"{row['rows']} row{'s' * (row['rows'] != '1')}"
        rows.append(
            [
                f"{row['what']}, {size}",
                f"{row['base_ms']:.0f} ms",
                *(f"{row['ratios'][n]:.3f}×" for n in names),
                *theirs,
            ]
        )
    counts = ", ".join(f"{name} {count:,}" for name, count in results["parameters"].items())
    text = (
        f"{results['model']} ({in_words(results['machine'])}). Ratios are medians, over the base's time in the same round. "
        "A merged model does the same work as the base: the distance of its ratios from 1 is the noise of this measurement. "
        f"Parameters: {counts}. The paper's figures are of {results['paper']}.\n"
    )
    return ["## What inference costs\n", text, table(columns, rows)]


if __name__ == "__main__":
    main()
