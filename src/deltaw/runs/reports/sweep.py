"""A sweep's results as a Report, and as the rows of a table. Knows results; nothing of models or HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deltaw.files import units
from deltaw.runs.evaluation.bootstrap import ERROR_RATE, Choice, Compared, Tested, figure
from deltaw.runs.evaluation.metrics import limits
from deltaw.runs.memory.machine import foot, placeless
from deltaw.runs.reports.compare import BY_ITEM, interval, score, seeds_note, settings_rows
from deltaw.runs.reports.directions import alike_maps, alike_tables
from deltaw.runs.reports.page import Chart, Report, Series, Table
from deltaw.runs.results.study import Failed
from deltaw.runs.results.sweep import SweepResults, SweepRow, TriedRate

COLUMNS = ("targets", "r", "α", "lr", "parameters", "adapter", "with optimizer", "step")


def cells(row: SweepRow, metrics: Sequence[str]) -> list[str]:
    """Return a candidate as text, under COLUMNS and the metrics."""
    first, best = [row.targets, str(row.rank), f"{row.alpha:g}"], row.best
    if isinstance(best, Failed):
        return [*first, "failed", *["–"] * (len(COLUMNS) - 4 + len(metrics))]
    figures = [
        f"{best.lr:g}", f"{best.parameters:,}", units.size(best.bytes), units.size(best.bytes_with_optimizer),
        f"{best.step_seconds:.2f} s",
    ]  # fmt: skip
    return [*first, *figures, *(score(best.scores[m]) for m in metrics)]


def metrics_of(results: SweepResults) -> list[str]:
    """Return the metrics that the candidates are scored by."""
    return list(results.trained[0][1].scores) if results.trained else []


def ordered(results: SweepResults) -> list[SweepRow]:
    """Return the rows by targets, in the order given, then by rank."""
    places = {targets: i for i, targets in enumerate(dict.fromkeys(row.targets for row in results.rows))}
    return sorted(results.rows, key=lambda row: (places[row.targets], row.rank))


def sentences(results: SweepResults) -> list[str]:
    """Return what each choice of targets came to, or where no ranks were compared which targets are best."""
    chosen = [_sentence(results, targets, choice) for targets, choice in results.choices.items()]
    return chosen if chosen and not results.compared else [*chosen, _best_targets(results)]


def _sentence(results: SweepResults, targets: str, choice: Choice) -> str:
    sizes = {row.rank: best.bytes for row, best in results.trained if row.targets == targets}
    tested = {test.rank: test for test in choice.tested}
    recommended, largest = tested[choice.rank], choice.tested[-1]
    text = f"r = {choice.rank}: {units.size(sizes[choice.rank])}, {choice.by} {figure(recommended.loss.value)}"
    if choice.rank != largest.rank:
        text += f" against {figure(largest.loss.value)} at r = {largest.rank}"
    else:
        text += "; a larger one was not tried"
    text += "".join(f"; {reason}" for reason in why_no_smaller(choice))
    return text + (f" ({targets})." if len(results.choices) > 1 else ".")


def why_no_smaller(choice: Choice) -> list[str]:
    """Return what ended the tests below the chosen rank: a rank that is worse, or one that these records cannot decide.

    For the latter also the margin with which a smaller rank would be enough. Last, the smallest rank that is enough by itself,
    but was not reached.
    """
    smaller = [test for test in choice.tested if test.rank < choice.rank]
    if not smaller:
        return []
    ended = max(smaller, key=lambda test: test.rank)
    difference = f"its {choice.by} less the largest rank's is {interval(ended.difference)}"
    if ended.difference.low > 0:
        reasons = [f"r = {ended.rank} is worse: {difference}"]
    else:
        reasons = [
            f"r = {ended.rank} is not shown to be enough, nor to be worse: {difference}, the margin {choice.margin:.4f}; more "
            "records would tell",
            *_with_more_margin(smaller, 1.0 if choice.by == ERROR_RATE else choice.tested[-1].loss.value, choice.by),
        ]  # fmt: skip
    passing = min((test.rank for test in smaller if test.enough), default=None)
    return reasons + ([f"r = {passing} would be enough by itself"] if passing is not None else [])


def _with_more_margin(smaller: Sequence[Tested], whole: float, by: str) -> list[str]:
    """Return the smallest of these ranks that is not worse, nor any above it, and the margin for it, a share of `whole`."""
    rank, most = 0, 0.0
    for test in sorted(smaller, key=lambda test: -test.rank):
        if test.difference.low > 0:
            break
        rank, most = test.rank, max(most, test.difference.high)
    if most >= whole:  # such a margin allows anything
        return []
    of = "records" if by == ERROR_RATE else "loss"
    return [f"r = {rank} would be enough with a margin of {math.ceil(1000 * most / whole) / 10:g}% of the {of}"]


def _best_targets(results: SweepResults) -> str:
    """Return which candidate is best, and which others are not shown to be worse."""
    runs = {row.name: best for row, best in results.trained}
    if not runs:
        return "Every candidate failed."
    if not results.compared:
        ((name, run),) = runs.items()
        figures = f"held-out loss {run.valid_loss:.4f}, with {run.parameters:,} parameters"
        return f"{name}: {figures}; there is no other to compare it with."
    best, *others = results.compared
    near = [other.name for other in others if not other.worse]
    text = (
        f"{best.name} has the least loss of {len(results.compared)}: {interval(best.score)}, "
        f"{runs[best.name].parameters:,} parameters"
    )
    if not near:
        return f"{text}; the others are shown to be worse."
    return f"{text}; not shown to be worse: {'; '.join(near)}."


def sweep_report(results: SweepResults) -> Report:
    """Return the page about a sweep."""
    settings, metrics, rows = results.settings, metrics_of(results), ordered(results)
    note = note_on_intervals(results)
    tables = [Table("Candidates", [*COLUMNS, *metrics], [cells(row, metrics) for row in rows], note=note)]
    tables += [_choice_table(targets, choice) for targets, choice in results.choices.items()]
    tables += [_compared_table(results.compared)] if results.compared else []
    tables += [
        *alike_tables(results.alike),
        _rates(rows),
        Table("Settings", ["setting", "value"], settings_rows(results.options | settings.run)),
    ]
    return Report(
        title=f"Ranks tried: {placeless(settings.model)} on {placeless(settings.data)}",
        headline=" ".join(sentences(results)),
        curves=_curves(results),
        maps=alike_maps(results.alike),
        tables=tables,
        warnings=[
            *results.warnings,
            *(f"{targets} was left out: {why}." for targets, why in results.left_out.items()),
            *(f"{row.name} failed: {row.best.error}" for row in rows if isinstance(row.best, Failed)),
        ],
        footer=foot(results.environment),
    )


def note_on_intervals(results: SweepResults) -> str:
    """Return what the candidates' intervals are over."""
    tested = f"Test set: {results.sets['test']}. " if results.sets else ""
    scores = [next(iter(best.scores.values())) for _, best in results.trained]
    return f"{tested}{BY_ITEM}{seeds_note(scores)} α is the same for all ranks, so the scale is α/r."


def _choice_table(targets: str, choice: Choice) -> Table:
    """Return each rank beside the largest."""
    largest = choice.tested[-1].rank
    rows = [
        [str(test.rank), interval(test.loss), interval(test.difference), "yes" if test.enough else "no"]
        for test in choice.tested
    ]
    note = (
        f"A rank is enough if the interval of the difference ends below the margin of {choice.margin:.4f}. The tests go down "
        f"from r = {largest} and end at the first that fails; so {len(rows) - 1} comparisons err together no more often than one "
        "(5%). Differences are taken item by item and seed by seed, and of several seeds have their variance in the interval."
    )
    return Table(
        f"Which rank is enough: {targets}",
        ["r", f"test {choice.by}", f"less that of r = {largest}", "enough"],
        rows,
        note,
    )


def _compared_table(candidates: Sequence[Compared]) -> Table:
    """Return each candidate beside the best."""
    best, *others = candidates
    rows = [[best.name, interval(best.score), "–", "–"]]
    rows += [
        [other.name, interval(other.score), interval(other.difference), "yes" if other.worse else "not shown"]
        for other in others
    ]
    count = len(candidates)
    note = (
        f"Which one is best is known by these losses alone, so the intervals of the differences are made to hold for all "
        f"{count * (count - 1) // 2} pairs together (95%). They are taken item by item, and of several seeds seed by seed."
    )
    return Table("Candidates beside the best", ["candidate", "test loss", "less the best one's", "worse"], rows, note)


def _curves(results: SweepResults) -> list[Chart]:
    rows = [(row, row.best) for row in ordered(results) if not isinstance(row.best, Failed)]
    charts, ranks = [], sorted({row.rank for row, _ in rows})
    for metric in metrics_of(results):
        series = []
        for targets in dict.fromkeys(row.targets for row, _ in rows):
            points = [(row.rank, best.scores[metric]) for row, best in rows if row.targets == targets]
            spans = [(rank, s.low, s.high) for rank, s in points]
            series.append(Series(targets, [(rank, s.value) for rank, s in points], "line", spans=spans))
        charts.append(
            Chart(
                f"{metric} against rank",
                "r",
                f"test {metric}",
                series,
                log_x=True,
                x_ticks=ranks,
                y_most=limits(metric)[1],
                note=_CURVE,
            )
        )
    held = [Series(row.name, best.valid, "line") for row, best in rows]
    return [*charts, Chart("Held-out loss in training", "step", "nats", held)]


_CURVE = (
    "Bars are 95% intervals over the test items; ranks that share the items are compared better in pairs, in the table."
)


def _rates(rows: Sequence[SweepRow]) -> Table:
    tried = [[row.name, f"{rate.lr:g}", _came_to(rate)] for row in rows for rate in row.tried]
    return Table("Learning rates", ["candidate", "lr", "held-out loss"], tried, note="The test records do not decide.")


def _came_to(tried: TriedRate) -> object:
    if tried.error:
        return "failed"
    if tried.behind is None:
        return tried.valid_loss
    return f"{tried.valid_loss:.4f}, ended at step {tried.behind}"
