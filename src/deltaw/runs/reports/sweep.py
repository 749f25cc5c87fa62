"""A sweep's results as a Report, and as the rows of a table. Knows results.json; nothing of models or HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.files import units
from deltaw.runs.memory.machine import in_words
from deltaw.runs.reports.compare import BY_ITEM, interval, score, seeds_note
from deltaw.runs.reports.directions import alike_maps, alike_tables
from deltaw.runs.reports.page import Chart, Report, Series, Table

COLUMNS = ("targets", "r", "α", "lr", "parameters", "adapter", "with optimizer", "step")


def cells(row: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """A candidate's row as text, under COLUMNS and the metrics."""
    first = [row["targets"], str(row["rank"]), f"{row['alpha']:g}"]
    if "error" in row:
        return [*first, "failed", *["–"] * (len(COLUMNS) - 4 + len(metrics))]
    own = [
        f"{row['lr']:g}", f"{row['parameters']:,}", units.size(row["bytes"]), units.size(row["bytes_with_optimizer"]),
        f"{row['step_seconds']:.2f} s",
    ]  # fmt: skip
    return [*first, *own, *(score(row["scores"][m]) for m in metrics)]


def metrics_of(results: Mapping[str, Any]) -> list[str]:
    """Those that the candidates are scored by."""
    return list(next((row["scores"] for row in results["rows"] if "scores" in row), {}))


def ordered(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """By targets, in the order given, then by rank."""
    places = {targets: i for i, targets in enumerate(dict.fromkeys(row["targets"] for row in results["rows"]))}
    return sorted(results["rows"], key=lambda row: (places[row["targets"]], row["rank"]))


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What each choice of targets came to, or without ranks to choose from which targets are best."""
    found = [_sentence(results, targets, choice) for targets, choice in results["choices"].items()]
    return found if found and not results["compared"] else [*found, _of_targets(results)]


def _sentence(results: Mapping[str, Any], targets: str, choice: Mapping[str, Any]) -> str:
    rows = {row["rank"]: row for row in results["rows"] if row["targets"] == targets and "error" not in row}
    tested = {each["rank"]: each for each in choice["tested"]}
    own, largest = tested[choice["rank"]], choice["tested"][-1]
    loss = f"loss {own['loss']['value']:.3f} [{own['loss']['low']:.3f}, {own['loss']['high']:.3f}]"
    text = f"r = {choice['rank']}: {units.size(rows[choice['rank']]['bytes'])}, {loss}"
    if choice["rank"] != largest["rank"]:
        text += f" against {largest['loss']['value']:.3f} at r = {largest['rank']}"
    else:
        text += "; a larger one was not tried"
    text += "".join(f"; {said}" for said in why_no_smaller(choice["tested"], choice["rank"], choice["margin"]))
    return text + (f" ({targets})." if len(results["choices"]) > 1 else ".")


def why_no_smaller(tested: Sequence[Mapping[str, Any]], rank: int, margin: float) -> list[str]:
    """What ended the tests below the recommended rank: a rank that is worse, or one of which these records cannot tell, and then
    the margin with which a smaller one would be enough. And the smallest rank that is enough by itself, but was not come to."""
    smaller = [each for each in tested if each["rank"] < rank]
    if not smaller:
        return []
    ended = max(smaller, key=lambda each: each["rank"])
    difference = f"its loss less the largest rank's is {interval(ended['difference'])}"
    if ended["difference"]["low"] > 0:
        found = [f"r = {ended['rank']} is worse: {difference}"]
    else:
        found = [
            f"r = {ended['rank']} is not shown to be enough, nor to be worse: {difference}, the margin {margin:.4f}; more "
            "records would tell",
            *_with_more_margin(smaller, tested[-1]["loss"]["value"]),
        ]  # fmt: skip
    passing = min((each["rank"] for each in smaller if each["enough"]), default=None)
    return found + ([f"r = {passing} would be enough by itself"] if passing is not None else [])


def _with_more_margin(smaller: Sequence[Mapping[str, Any]], loss: float) -> list[str]:
    """The smallest of these ranks of which neither it nor a larger one is shown to be worse, and the margin that this takes."""
    rank, most = 0, 0.0
    for each in sorted(smaller, key=lambda each: -each["rank"]):
        if each["difference"]["low"] > 0:
            break
        rank, most = each["rank"], max(most, each["difference"]["high"])
    if loss <= 0:
        return []
    return [f"r = {rank} would be enough with a margin of {math.ceil(1000 * most / loss) / 10:g}% of the loss"]


def _of_targets(results: Mapping[str, Any]) -> str:
    """Which candidate is best, where there are several choices of targets, and which are not shown to be worse."""
    rows = {row["name"]: row for row in results["rows"] if "scores" in row}
    if not rows:
        return "Every candidate failed."
    beside = results["compared"]
    if not beside:
        (row,) = rows.values()
        own = f"held-out loss {row['valid_loss']:.4f}, with {row['parameters']:,} parameters"
        return f"{row['name']}: {own}; there is no other to compare it with."
    best, *others = beside
    near = [each["name"] for each in others if not each["worse"]]
    parameters = rows[best["name"]]["parameters"]
    text = f"{best['name']} has the least loss of {len(beside)}: {interval(best['score'])}, {parameters:,} parameters"
    if not near:
        return f"{text}; the others are shown to be worse."
    return f"{text}; not shown to be worse: {'; '.join(near)}."


def sweep_report(results: Mapping[str, Any]) -> Report:
    """The page."""
    settings, metrics = results["settings"], metrics_of(results)
    rows = ordered(results)
    note = note_on_intervals(results)
    tables = [Table("Candidates", [*COLUMNS, *metrics], [cells(row, metrics) for row in rows], note=note)]
    tables += [choice_table(targets, choice) for targets, choice in results["choices"].items()]
    tables += [_compared_table(results["compared"])] if results["compared"] else []
    tables += [
        *alike_tables(results["alike"]),
        _rates(rows),
        Table("Settings", ["setting", "value"], _settings(settings)),
    ]
    return Report(
        title=f"Ranks tried: {settings['model']} on {settings['data']}",
        headline=" ".join(sentences(results)),
        curves=_curves(results, rows),
        maps=alike_maps(results["alike"]),
        tables=tables,
        warnings=[
            *results.get("warnings", ()),
            *(f"{targets} was left out: {why}." for targets, why in results["left_out"].items()),
            *(f"{row['name']} failed: {row['error']}" for row in rows if "error" in row),
        ],
        footer=in_words(results["environment"]),
    )


def note_on_intervals(results: Mapping[str, Any]) -> str:
    """What the candidates' intervals are over."""
    tested = f"Test set: {results['sets']['test']}. " if "sets" in results else ""
    scores = [next(iter(row["scores"].values())) for row in results["rows"] if "scores" in row]
    return f"{tested}{BY_ITEM}{seeds_note(scores)} α is the same for all ranks, so the scale is α/r."


def choice_table(targets: str, choice: Mapping[str, Any]) -> Table:
    """Each rank against the largest."""
    largest = choice["tested"][-1]["rank"]
    rows = [
        [str(each["rank"]), interval(each["loss"]), interval(each["difference"]), "yes" if each["enough"] else "no"]
        for each in choice["tested"]
    ]
    note = (
        f"A rank is enough if the interval of the difference ends below the margin of {choice['margin']:.4f}. The tests go down "
        f"from r = {largest} and end at the first that fails; so {len(rows) - 1} comparisons err together no more often than one "
        "(5%). Differences are taken item by item and seed by seed, and of several seeds have their variance in the interval."
    )
    return Table(
        f"Which rank is enough: {targets}", ["r", "test loss", f"less that of r = {largest}", "enough"], rows, note
    )


def _compared_table(beside: Sequence[Mapping[str, Any]]) -> Table:
    """Each candidate against the best."""
    best, *others = beside
    rows = [[best["name"], interval(best["score"]), "–", "–"]]
    rows += [
        [e["name"], interval(e["score"]), interval(e["difference"]), "yes" if e["worse"] else "not shown"]
        for e in others
    ]
    count = len(beside)
    note = (
        f"Which one is best is known by these losses alone, so the intervals of the differences are made to hold for all "
        f"{count * (count - 1) // 2} pairs together (95%). They are taken item by item, and of several seeds seed by seed."
    )
    return Table("Candidates beside the best", ["candidate", "test loss", "less the best one's", "worse"], rows, note)


def _curves(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    good = [row for row in rows if "scores" in row]
    charts, ranks = [], sorted({row["rank"] for row in good})
    for metric in metrics_of(results):
        series = []
        for targets in dict.fromkeys(row["targets"] for row in good):
            own = [row for row in good if row["targets"] == targets]
            found = [(row["rank"], row["scores"][metric]) for row in own]
            spans = [(rank, s["low"], s["high"]) for rank, s in found]
            series.append(Series(targets, [(rank, s["value"]) for rank, s in found], "line", spans=spans))
        charts.append(
            Chart(f"{metric} against rank", "r", f"test {metric}", series, log_x=True, x_ticks=ranks, note=_CURVE)
        )
    held = [Series(row["name"], [tuple(point) for point in row["valid"]], "line") for row in good]
    return [*charts, Chart("Held-out loss in training", "step", "nats", held)]


_CURVE = (
    "Bars are 95% intervals over the test items; ranks that share the items are compared better in pairs, in the table."
)


def _rates(rows: Sequence[Mapping[str, Any]]) -> Table:
    tried = [[row["name"], f"{t['lr']:g}", _came_to(t)] for row in rows for t in row["tried"]]
    return Table("Learning rates", ["candidate", "lr", "held-out loss"], tried, note="The test records do not decide.")


def _came_to(tried: Mapping[str, Any]) -> object:
    if tried["error"]:
        return "failed"
    return (
        tried["valid_loss"]
        if tried["behind"] is None
        else f"{tried['valid_loss']:.4f}, ended at step {tried['behind']}"
    )


def _settings(settings: Mapping[str, Any]) -> list[list[object]]:
    return [[k, str(v)] for part in ("options", "run") for k, v in settings[part].items()]
