"""A comparison's results as a Report, and as the rows of a table. Knows results; nothing of models or HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deltaw.files import units
from deltaw.runs.evaluation.bootstrap import Compared
from deltaw.runs.evaluation.bootstrap import figure as rounded
from deltaw.runs.evaluation.metrics import limits
from deltaw.runs.memory.machine import foot, placeless
from deltaw.runs.reports.page import Chart, Report, Series, Table
from deltaw.runs.results.compare import BestRun, ComparisonResults, LatencyRow, MethodRow, Trained
from deltaw.runs.results.scores import HasInterval, SeedScores
from deltaw.runs.results.study import Failed, StudySettings

# GPT-2 M on a GPU (arXiv 2106.09685, Table 1): batch × length → ms, and what adapter layers add
PAPER = (
    ("1×128", "19.8 ms", "+20.7%", "+30.3%"),
    ("16×256", "338.0 ms", "+5.0%", "+8.4%"),
    ("32×512", "1449.4 ms", "+2.2%", "+3.0%"),
)
# Rounds of timing below which a median is hardly one
_FEW = 3
COLUMNS = ("method", "lr", "parameters", "share", "adapter", "with optimizer", "memory", "step", "held-out loss")


def in_words(rows: Sequence[Compared], metric: str, reference: str) -> str:
    """Return which differences from the first row are shown by paired intervals, and which are not."""
    shown = {
        f"worse than {reference}": [row for row in rows[1:] if row.worse],
        f"better than {reference}": [row for row in rows[1:] if row.better],
    }
    parts = [f"shown to be {how}: {_differences(alike)}" for how, alike in shown.items() if alike]
    open_ones = [row for row in rows[1:] if not row.worse and not row.better]
    if open_ones:
        parts.append(f"no difference from {reference} is shown for {_differences(open_ones)}")
    text = "; ".join(parts)
    return f"By {metric}, in pairs on the same test items, {text}." if text else ""


def _differences(rows: Sequence[Compared]) -> str:
    return ", ".join(f"{row.name} ({_signed(row.difference)})" for row in rows)


def _signed(difference: HasInterval) -> str:
    ends = (difference.value, difference.low, difference.high)
    value, low, high = (f"{end:+.3f}".replace("-", "−") for end in ends)
    return f"{value} [{low}, {high}]"


def verdicts(results: ComparisonResults) -> list[str]:
    """Return in words which methods are shown to differ from the best one, and from full fine-tuning."""
    texts = []
    if len(results.compared) > 1:
        texts.append(in_words(results.compared, results.metric, f"the best, {results.compared[0].name}"))
    full = results.beside_full
    if len(full) > 1 and full[0].name != results.compared[0].name:
        texts.append(in_words(full, results.metric, f"full fine-tuning ({full[0].name})"))
    return texts


def beside_columns(results: ComparisonResults) -> list[str]:
    """Return the columns of `beside`; none where nothing was compared."""
    return [f"{results.metric}, less the best's", "worse"] if results.compared else []


def beside(row: MethodRow, results: ComparisonResults) -> list[str]:
    """Return a method beside the best one, under `beside_columns`."""
    if not results.compared:
        return []
    others = {method.name: method for method in results.compared[1:]}
    if row.name not in others:
        return ["–", "–"]
    return [interval(others[row.name].difference), "yes" if others[row.name].worse else "not shown"]


def _beside_full(results: ComparisonResults) -> list[Table]:
    """Return the table of the methods beside full fine-tuning, where that is not the best one anyway."""
    full = results.beside_full
    if len(full) < 2 or full[0].name == results.compared[0].name:
        return []
    rows = [
        [
            row.name,
            interval(row.difference),
            "worse" if row.worse else "better" if row.better else "no difference shown",
        ]
        for row in full[1:]
    ]
    columns = ["method", f"{results.metric}, less that of {full[0].name}", "shown to be"]
    return [Table("Methods beside full fine-tuning", columns, rows, note=verdicts(results)[-1])]


def cells(row: MethodRow, metrics: Sequence[str]) -> list[str]:
    """Return a method as text, under COLUMNS and the metrics."""
    if isinstance(row.best, Failed):
        return [row.name, "failed", *["–"] * (len(COLUMNS) - 2 + len(metrics))]
    figures = row.best.figures
    memory = "–" if figures.memory is None else units.size(figures.memory)
    loss = "–" if figures.valid_loss is None else f"{figures.valid_loss:.4f}"
    texts = [
        row.name, f"{row.best.lr:g}", f"{figures.parameters:,}", f"{figures.share:.2%}", units.size(figures.bytes),
        units.size(figures.bytes_with_optimizer), memory, f"{figures.step_seconds:.2f} s", loss,
    ]  # fmt: skip
    return [*texts, *(score(row.best.scores[m]) for m in metrics)]


def score(scores: SeedScores) -> str:
    """Return a score with its 95% interval; of several seeds their mean and standard deviation."""
    ends = f"[{scores.low:.3f}, {scores.high:.3f}]"
    if len(scores.seeds) == 1:
        return f"{scores.seeds[0]:.3f} {ends}"
    return f"{scores.mean:.3f} ± {scores.deviation:.3f} {ends}"


def interval(figure: HasInterval) -> str:
    """Return a value with its 95% interval, to four decimals; small ones to two significant digits."""
    value, low, high = (rounded(v, 4) for v in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def latency_columns(results: ComparisonResults) -> list[str]:
    """Return what was timed, and in how many rounds where these were few."""

    def rounds(row: LatencyRow) -> str:
        count = _FEW if row.rounds is None else row.rounds
        return f" ({count} round{'s' * (count > 1)})" if count < _FEW else ""

    return [f"{row.what}, batch {row.batch}{rounds(row)}" for row in results.latency]


def latency_rows(results: ComparisonResults) -> list[list[str]]:
    """Return a row for the base, in milliseconds, and for each method, over the base's time."""
    timed = results.latency
    if not timed:
        return []
    base = ["base", *(f"{row.base * 1e3:.1f} ms" for row in timed)]
    return [base, *([name, *(f"{row.ratios[name]:.3f}×" for row in timed)] for name in timed[0].ratios)]


def headline(results: ComparisonResults) -> str:
    """Return the comparison in a sentence."""
    metric, trained = results.metric, results.trained
    if not trained:
        return "Every method failed."
    name, best = trained[0][0].name, trained[0][1]
    if len(trained) > 1 and len({other.scores[metric].mean for _, other in trained}) == 1:
        return f"The methods do not differ by {metric} on the test records: each scores {score(best.scores[metric])}."
    text = (
        f"{name} is best by {metric} on the test records: {score(best.scores[metric])}, with "
        f"{_brief(best.figures.parameters)} parameters."
    )
    return f"{text} {_others(results, best)}" if results.compared else text


def _others(results: ComparisonResults, best: BestRun) -> str:
    """Return which methods are not shown to be worse than the best one."""
    others = results.compared[1:]
    near = [other.name for other in others if not other.worse]
    if not near:
        return f"{'The other is' if len(others) == 1 else 'All others are'} shown to be worse."
    sizes = {row.name: run.figures.parameters for row, run in results.trained if row.name in near}
    least = min(sizes, key=lambda name: sizes[name])
    text = f"Not shown to be worse, in pairs on the same items: {', '.join(near)}"
    if sizes[least] < best.figures.parameters:
        text += f"; the smallest of them, {least}, has {_brief(sizes[least])}"
    return f"{text}."


def _brief(count: int) -> str:
    """Return a number of parameters in words: 4.9M, 338k, 512."""
    for unit, mark in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{mark}"
    return str(count)


def comparison_report(results: ComparisonResults) -> Report:
    """Return the page about a comparison."""
    settings, rows, by = results.settings, results.ranked, results.chosen_by
    return Report(
        title=f"Methods compared: {placeless(settings.model)} on {placeless(settings.data)}",
        headline=headline(results),
        facts=_facts(settings, results.trained, results.sets),
        curves=_curves(results),
        tables=[
            Table(
                "Methods", [*COLUMNS, *results.metrics], [cells(row, results.metrics) for row in rows],
                note=_NOTE + note_on_intervals(results),
            ),
            *_beside_tables(results),
            *_beside_full(results),
            *_latency_tables(results),
            Table(
                "Learning rates", ["method", "lr", "held-out loss", *(["held-out " + by] if by != "loss" else [])],
                [rate for row in rows for rate in _rates(row, by)], note=_RATES,
            ),
            Table(
                "Settings of each method", ["name", "method", "settings"],
                [[row.name, row.method, _settings(row)] for row in rows],
            ),
            Table("Settings of every run", ["setting", "value"], settings_rows(settings.run)),
        ],
        warnings=[*results.warnings, *_warnings(rows)],
        footer=foot(results.environment),
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


def seeds_note(scores: Sequence[SeedScores]) -> str:
    """Return which variance is in the intervals of these scores."""
    counts = {len(one.seeds) for one in scores}
    if counts <= {1}:
        return ONE_SEED
    return SEVERAL_SEEDS + (" A row with a single run has nothing of that in its interval." if 1 in counts else "")


def note_on_intervals(results: ComparisonResults) -> str:
    """Return what the methods' intervals are over."""
    return f"{BY_ITEM}{seeds_note([best.scores[results.metric] for _, best in results.trained])}"


def _beside_tables(results: ComparisonResults) -> list[Table]:
    columns, count, metric = beside_columns(results), len(results.compared), results.metric
    if not columns:
        return []
    rows = [[row.name, score(best.scores[metric]), *beside(row, results)] for row, best in results.trained]
    note = f"{verdicts(results)[0]} {_BESIDE.format(count * (count - 1) // 2)}"
    return [Table("Methods beside the best", ["method", metric, *columns], rows, note=note)]


_RATES = (
    "Of each method the best one counts: by held-out loss, of classes and numbers by the held-out score, and by the loss where "
    "scores are equal. The test records do not decide."
)


def _rates(row: MethodRow, by: str) -> list[list[object]]:
    """Return the learning rates tried, with the score that decided where that was not the loss."""
    tried: list[list[object]] = []
    for rate in row.tried:
        loss = "failed" if rate.error else rate.valid_loss
        tried.append([row.name, f"{rate.lr:g}", loss, *([rate.valid_score] if by != "loss" else [])])
    return tried


def settings_rows(settings: Mapping[str, object]) -> list[list[object]]:
    """Return settings as rows of a table."""
    return [[name, "" if value is None else placeless(str(value))] for name, value in settings.items()]


def _settings(row: MethodRow) -> str:
    return ", ".join(f"{k}={v}" for k, v in row.settings.items()) or "its defaults"


def _warnings(rows: Sequence[MethodRow]) -> list[str]:
    notes = [f"{row.name}: {note}" for row in rows if isinstance(row.best, BestRun) for note in row.best.figures.notes]
    return notes + [f"{row.name} failed: {row.best.error}" for row in rows if isinstance(row.best, Failed)]


def _facts(settings: StudySettings, trained: Sequence[Trained], sets: Mapping[str, str]) -> list[tuple[str, str, str]]:
    run = settings.run
    budget = (
        f"{run['minutes']:g} min"
        if run["minutes"]
        else f"{run['steps']} steps"
        if run["steps"]
        else f"{run['epochs']:g} epochs"
    )
    facts = [
        ("Budget", budget, f"each, batches of {run['batch']}"),
    ]
    if sets:
        count, _, of = sets["test"].partition(" ")
        note = f"{of.partition(' ')[2]}; trained on {sets['train']}; learning rates by {sets['valid']}"
        facts.append(("Test records", count, note))
    else:  # a file of an older version, which does not say
        facts.append(("Test records", f"≤ {settings.test_most:,}", "their number is not in the results"))
    if trained:
        sizes = {row.name: best.figures.parameters for row, best in trained}
        smallest, largest = (pick(sizes, key=lambda name: sizes[name]) for pick in (min, max))
        span = f"{_brief(sizes[smallest])} – {_brief(sizes[largest])}"
        facts.append(("Parameters", span, f"{smallest} to {largest}"))
    return facts


def _curves(results: ComparisonResults) -> list[Chart]:
    trained, metric, timed = results.trained, results.metric, results.latency
    if not trained:
        return []
    charts = [
        Chart(
            "Quality against parameters", "trainable parameters", f"{metric} on the test records",
            [
                Series(row.name, [(best.figures.parameters, s) for s in best.scores[metric].seeds], "points")
                for row, best in trained
            ],
            log_x=True, y_most=limits(metric)[1], note="As in the paper's Figure 2; a point for each seed.",
        ),
        Chart(
            "Held-out loss in training", "step", "nats", [Series(row.name, best.valid, "line") for row, best in trained]
        ),
    ]  # fmt: skip
    if timed:
        names = list(timed[0].ratios)
        charts.append(Chart(
            f"Inference over the base's time: {timed[0].what}, batch {timed[0].batch}", "", "times the base",
            [Series("ratio", [(i, timed[0].ratios[n]) for i, n in enumerate(names)], "bars", labels=names)],
        ))  # fmt: skip
    return charts


def _latency_tables(results: ComparisonResults) -> list[Table]:
    if not results.latency:
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
