"""A comparison's results as a Report, and as the rows of a table. Knows results.json; nothing of models or HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.files import units
from deltaw.runs.evaluation.metrics import MORE_IS_BETTER
from deltaw.runs.memory.machine import in_words
from deltaw.runs.reports.page import Chart, Report, Series, Table

# GPT-2 M on a GPU (arXiv 2106.09685, Table 1): batch × length → ms, and what adapter layers add
PAPER = (
    ("1×128", "19.8 ms", "+20.7%", "+30.3%"),
    ("16×256", "338.0 ms", "+5.0%", "+8.4%"),
    ("32×512", "1449.4 ms", "+2.2%", "+3.0%"),
)
# Rounds of timing below which a median is hardly one
_FEW = 3
COLUMNS = ("method", "lr", "parameters", "share", "adapter", "with optimizer", "memory", "step", "held-out loss")


def metric_of(results: Mapping[str, Any]) -> str:
    """The metric that the methods are ranked by: the last that there is."""
    scored = [row["scores"] for row in results["rows"] if row.get("scores")]
    return next(reversed(scored[0]), "") if scored else ""


def ranked(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The methods' rows, the best first, of equals the smaller; those that failed last."""
    metric = metric_of(results)
    sign = -1.0 if metric in MORE_IS_BETTER else 1.0

    def key(row: Mapping[str, Any]) -> tuple[float, int]:
        value = sign * mean(row["scores"][metric]["seeds"]) if row.get("scores") else math.inf
        return (math.inf if math.isnan(value) else value, row.get("parameters", 0))

    return sorted(results["rows"], key=key)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def beside_columns(results: Mapping[str, Any]) -> list[str]:
    """Names of what `beside` says; none where nothing was compared."""
    return [f"{metric_of(results)}, less the best's", "worse"] if results.get("compared") else []


def beside(row: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """A method beside the best one, under `beside_columns`."""
    if not results.get("compared"):
        return []
    places = {each["name"]: (i, each) for i, each in enumerate(results["compared"])}
    if row["name"] not in places or not places[row["name"]][0]:
        return ["–", "–"]
    each = places[row["name"]][1]
    return [interval(each["difference"]), "yes" if each["worse"] else "not shown"]


def cells(row: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """A method's row as text, under COLUMNS and the metrics."""
    if "error" in row:
        return [row["name"], "failed", *["–"] * (len(COLUMNS) - 2 + len(metrics))]
    memory = "–" if row["memory"] is None else units.size(row["memory"])
    loss = "–" if row["valid_loss"] is None else f"{row['valid_loss']:.4f}"
    own = [
        row["name"], f"{row['lr']:g}", f"{row['parameters']:,}", f"{row['share']:.2%}", units.size(row["bytes"]),
        units.size(row["bytes_with_optimizer"]), memory, f"{row['step_seconds']:.2f} s", loss,
    ]  # fmt: skip
    return [*own, *(score(row["scores"][m]) for m in metrics)]


def score(found: Mapping[str, Any]) -> str:
    """A score with its 95% interval; of several seeds their mean and spread."""
    seeds = found["seeds"]
    interval = f"[{found['low']:.3f}, {found['high']:.3f}]"
    if len(seeds) == 1:
        return f"{seeds[0]:.3f} {interval}"
    return (
        f"{mean(seeds):.3f} ± {(sum((s - mean(seeds)) ** 2 for s in seeds) / (len(seeds) - 1)) ** 0.5:.3f} {interval}"
    )


def interval(found: Mapping[str, float]) -> str:
    """A value with its 95% interval, to four decimals."""
    return f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def latency_columns(results: Mapping[str, Any]) -> list[str]:
    """Names of the timed tasks, and in how many rounds where these were few."""

    def rounds(row: Mapping[str, Any]) -> str:
        count = row.get("rounds", _FEW)
        return f" ({count} round{'s' * (count > 1)})" if count < _FEW else ""

    return [f"{row['what']}, batch {row['batch']}{rounds(row)}" for row in results["latency"]]


def latency_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A row for the base, in milliseconds, and for each method, over the base's time."""
    timed = results["latency"]
    if not timed:
        return []
    base = ["base", *(f"{row['base'] * 1e3:.1f} ms" for row in timed)]
    names = list(timed[0]["ratios"])
    return [base, *([name, *(f"{row['ratios'][name]:.3f}×" for row in timed)] for name in names)]


def headline(results: Mapping[str, Any]) -> str:
    """The comparison in a sentence."""
    metric, rows = metric_of(results), [row for row in ranked(results) if row.get("scores")]
    if not rows:
        return "Every method failed."
    best = rows[0]
    found = best["scores"][metric]
    if len(rows) > 1 and len({mean(r["scores"][metric]["seeds"]) for r in rows}) == 1:
        return f"The methods do not differ by {metric} on the test records: each scores {score(found)}."
    text = f"{best['name']} is best by {metric} on the test records: {score(found)}, with {_many(best['parameters'])} parameters."
    if not results.get("compared"):
        return text
    others = results["compared"][1:]
    near = [each["name"] for each in others if not each["worse"]]
    if not near:
        return f"{text} {'The other is' if len(others) == 1 else 'All others are'} shown to be worse."
    least = min((r for r in rows if r["name"] in near), key=lambda r: r["parameters"])
    text += f" Not shown to be worse, in pairs on the same items: {', '.join(near)}"
    if least["parameters"] < best["parameters"]:
        text += f"; the smallest of them, {least['name']}, has {_many(least['parameters'])}"
    return f"{text}."


def _many(count: int) -> str:
    """A number of parameters in words: 4.9M, 338k, 512."""
    for unit, mark in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{mark}"
    return str(count)


def comparison_report(results: Mapping[str, Any]) -> Report:
    """The page."""
    settings, rows, by = results["settings"], ranked(results), results["chosen_by"]
    metric = metric_of(results)
    good = [row for row in rows if row.get("scores")]
    metrics = list(good[0]["scores"]) if good else []
    note = _NOTE + note_on_intervals(results)
    return Report(
        title=f"Methods compared: {settings['model']} on {settings['data']}",
        headline=headline(results),
        facts=_facts(settings, good, results.get("sets", {})),
        curves=_curves(good, metric, results["latency"]),
        tables=[
            Table("Methods", [*COLUMNS, *metrics], [cells(row, metrics) for row in rows], note=note),
            *_beside_tables(results, rows),
            *_latency_tables(results),
            Table(
                "Learning rates", ["method", "lr", "held-out loss", *(["held-out " + by] if by != "loss" else [])],
                [cells for row in rows for cells in _rates(row, by)], note=_RATES,
            ),
            Table(
                "Settings of each method", ["name", "method", "settings"],
                [[row["name"], row["method"], _settings(row)] for row in rows],
            ),
            Table("Settings of every run", ["setting", "value"], [[k, str(v)] for k, v in settings["run"].items()]),
        ],
        warnings=[*results.get("warnings", ()), *_warnings(rows)],
        footer=in_words(results["environment"]),
    )  # fmt: skip


_NOTE = (
    "Memory is what training held over the loaded model and its adapter. Of full fine-tuning the base's own weights, which stay "
    "beside the trained ones, are in the loaded model, and so not counted. "
)
BY_ITEM = "Intervals are 95%, by bootstrap over items: records with the same prompt are one. "
ONE_SEED = "Each is of one run: what another seed would change is not in them."
SEVERAL_SEEDS = (
    "The seeds' variance is in them, with Student's t for their few; ± is the standard deviation over seeds."
)
_BESIDE = (
    "In pairs: the difference on the same items, and of several seeds seed by seed. Which method is best, these scores alone "
    "say; so the intervals are made to hold for all {} pairs together (95%). Not shown to be worse is not shown to be equal."
)


def seeds_note(scores: Sequence[Mapping[str, Any]]) -> str:
    """Which variance is in the intervals of these scores."""
    counts = {len(score["seeds"]) for score in scores}
    if counts <= {1}:
        return ONE_SEED
    return SEVERAL_SEEDS + (" A row with a single run has nothing of that in its interval." if 1 in counts else "")


def note_on_intervals(results: Mapping[str, Any]) -> str:
    """What the methods' intervals are over."""
    metric = metric_of(results)
    return f"{BY_ITEM}{seeds_note([row['scores'][metric] for row in results['rows'] if row.get('scores')])}"


def _beside_tables(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    columns, count = beside_columns(results), len(results.get("compared", ()))
    if not columns:
        return []
    shown = [
        [row["name"], score(row["scores"][metric_of(results)]), *beside(row, results)]
        for row in rows
        if row.get("scores")
    ]
    note = _BESIDE.format(count * (count - 1) // 2)
    return [Table("Methods beside the best", ["method", metric_of(results), *columns], shown, note=note)]


_RATES = (
    "Of each method the best one counts: by held-out loss, of classes and numbers by the held-out score, and by the loss where "
    "scores are equal. The test records do not decide."
)


def _rates(row: Mapping[str, Any], by: str) -> list[list[object]]:
    """What was tried, with the score that decided where that was not the loss."""
    tried: list[list[object]] = []
    for t in row["tried"]:
        loss = "failed" if t["error"] else t["valid_loss"]
        tried.append([row["name"], f"{t['lr']:g}", loss, *([t["valid_score"]] if by != "loss" else [])])
    return tried


def _settings(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in row["settings"].items()) or "its defaults"


def _warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [f"{row['name']}: {note}" for row in rows for note in row.get("notes", ())]
    return notes + [f"{row['name']} failed: {row['error']}" for row in rows if "error" in row]


def _facts(
    settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], sets: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    run = settings["run"]
    budget = (
        f"{run['minutes']:g} min"
        if run["minutes"]
        else f"{run['steps']} steps"
        if run["steps"]
        else f"{run['epochs']:g} epochs"
    )
    facts = [
        ("Budget", budget, f"each, batches of {run['batch']}"),
        ("Test records", f"{settings['test_most']:,}", "at most"),
    ]
    if sets:
        facts[-1] = ("Test set", sets["test"], f"trained on {sets['train']}; learning rates by {sets['valid']}")
    if rows:
        smallest, largest = (f(rows, key=lambda r: r["parameters"]) for f in (min, max))
        span = f"{_many(smallest['parameters'])} – {_many(largest['parameters'])}"
        facts.append(("Parameters", span, f"{smallest['name']} to {largest['name']}"))
    return facts


def _curves(rows: Sequence[Mapping[str, Any]], metric: str, timed: Sequence[Mapping[str, Any]]) -> list[Chart]:
    if not rows:
        return []
    charts = [
        Chart(
            "Quality against parameters", "trainable parameters", f"{metric} on the test records",
            [Series(r["name"], [(r["parameters"], s) for s in r["scores"][metric]["seeds"]], "points") for r in rows],
            log_x=True, note="As in the paper's Figure 2; a point for each seed.",
        ),
        Chart(
            "Held-out loss in training", "step", "nats",
            [Series(r["name"], [(step, loss) for step, loss in r["valid"]], "line") for r in rows],
        ),
    ]  # fmt: skip
    if timed:
        names = list(timed[0]["ratios"])
        charts.append(Chart(
            f"Inference over the base's time: {timed[0]['what']}, batch {timed[0]['batch']}", "", "times the base",
            [Series("ratio", [(i, timed[0]["ratios"][n]) for i, n in enumerate(names)], "bars", labels=names)],
        ))  # fmt: skip
    return charts


def _latency_tables(results: Mapping[str, Any]) -> list[Table]:
    if not results["latency"]:
        return []
    return [
        Table(
            "Inference", ["", *latency_columns(results)], latency_rows(results),
            note="Medians, in turn with the base; ratios over the base's time in the same round.",
        ),
        Table(
            "The paper's latencies", ["batch × length", "base or LoRA merged", "adapter layers of Lin", "of Houlsby"], PAPER,
            note="GPT-2 M, forward, on a GPU (arXiv 2106.09685, Table 1).",
        ),
    ]  # fmt: skip
