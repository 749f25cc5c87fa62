"""A training run's figures and events as a Report. Knows results; nothing of HTML, models or files."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaw import __version__
from deltaw.errors import shown
from deltaw.files import units
from deltaw.runs.evaluation.bootstrap import Score
from deltaw.runs.memory.machine import foot, placeless
from deltaw.runs.reports.page import Chart, Report, Sample, Series, Table
from deltaw.runs.results.train import HeldOutScores, RunFigures
from deltaw.training.events import Answered, Evaluated, Event, Spiked, Stepped
from deltaw.training.loop import LoopState

# A loss's unit → its formula
_LOSSES = {
    "nats per supervised token": "−log p(y_t | x, y_<t), averaged over supervised tokens",
    "nats per record": "−log p(class | x), averaged over records",
    "squared error per record": "(ŷ − y)², averaged over records",
}


@dataclass(frozen=True)
class Sampled:
    """A held-out record with the completions of the base and of the adapter."""

    prompt: str
    reference: str | None
    """The wanted completion."""
    before: str | None
    """The base's completion; None where its head is untrained."""
    after: str | None
    """The adapter's completion."""
    turns: Sequence[tuple[str, str]] = ()
    """Role and text of each turn before the answer, of a conversation with more than one; the last one's text is `prompt`."""


def run_report(
    settings: Mapping[str, object],
    figures: RunFigures,
    events: Sequence[Event],
    samples: Sequence[Sampled],
    *,
    title: str | None = None,
    headline: str | None = None,
    tables: Sequence[Table] = (),
    charts: Sequence[Chart] = (),
    commands: Sequence[str] | None = None,
) -> Report:
    """Return the page about a run.

    settings: those in config.yaml. tables and charts are added to the run's. title, headline and commands replace its own.
    """
    adapter = f"{settings['out']}/adapter"
    return Report(
        title=title or f"{placeless(str(settings['model']))} on {placeless(str(settings['data']))}",
        headline=headline or _headline(figures, events),
        facts=_facts(figures),
        curves=[*_curves(events, figures), *charts],
        examples=_examples(samples, events),
        tables=[
            *tables, *_classes(figures.held_out), *_spikes(events), _merge(figures), _counts(figures), _settings(settings)
        ],
        warnings=list(figures.warnings),
        commands=list(commands) if commands is not None else next_commands(str(settings["model"]), adapter, settings),
        footer=foot(figures.environment) if figures.environment else f"deltaw {__version__}",
    )  # fmt: skip


def next_commands(model: str, adapter: str, settings: Mapping[str, object]) -> list[str]:
    """Return what to try with an adapter that these settings made."""
    model, adapter = (shlex.quote(name) for name in (model, adapter))
    speaks = {"causal": "chat", "seq2seq": "generate"}.get(str(settings.get("task", "causal")))
    return [
        *([f"deltaw {speaks} {model} --adapter {adapter}"] if speaks else []),
        f"deltaw eval {model} HELD_OUT_DATA --adapter {adapter}",
        f"deltaw merge {model} {adapter} -o MERGED",
    ]


def _headline(figures: RunFigures, events: Sequence[Event]) -> str:
    loop, scored = figures.loop, figures.held_out
    losses = [event.valid_loss for event in events if isinstance(event, Evaluated)]
    what = f"Training loss {loop.first_loss:.3f} → {loop.last_loss:.3f}"
    if losses:
        last = _score(scored.scores["loss"]) if scored and "loss" in scored.scores else f"{losses[-1]:.3f}"
        what = f"Held-out loss {losses[0]:.3f} → {last}"
    metric = _leading(scored)
    if scored and metric:
        what = f"Held-out {metric} {_score(scored.scores[metric])}, loss {losses[0]:.3f} → {losses[-1]:.3f}"
    return f"{what} with {units.size(figures.adapter_bytes)} of update in {units.duration(loop.seconds)}."


def _leading(scored: HeldOutScores | None) -> str | None:
    """Return the metric that people read first, beside the loss: of classes and numbers alone."""
    names = scored.scores if scored else ()
    return next((metric for metric in ("accuracy", "pearson", "spearman") if metric in names), None)


def _score(score: Score) -> str:
    """Return a score with its 95% interval, where there is one."""
    ends = f" [{score.low:.3f}, {score.high:.3f}]" if math.isfinite(score.low) else ""
    return f"{score.value:.3f}{ends}"


def _how_counted(loop: LoopState) -> str:
    """Return what the speed's tokens are: all of them, though those that records share are computed once."""
    shared = f"{loop.shared / loop.tokens:.0%} of them shared, and " if loop.shared else ""
    return f"{shared}padding not counted"


def _facts(figures: RunFigures) -> list[tuple[str, str, str]]:
    loop, counted = figures.loop, figures.counted
    by = f", by {figures.processes} processes" if figures.processes > 1 else ""
    facts = [
        ("Adapter", units.size(figures.adapter_bytes), f"base {units.size(figures.base_bytes)}"),
        ("Trainable", f"{figures.trainable_parameters:,}", f"{figures.trainable_share:.2%} of the base's parameters"),
        ("Time", units.duration(loop.seconds), f"{loop.step} steps, {loop.records:,} records{by}"),
        (
            "Speed",
            f"{loop.tokens / max(loop.step_seconds, 1e-9):.0f} {counted}/s",
            f"{loop.tokens:,} {counted}, {_how_counted(loop)}",
        ),
        ("Peak memory", units.size(figures.peak_memory), f"of {'one' if by else 'the'} process, base included"),
        ("‖ΔW‖ / ‖W0‖", f"{figures.relative_norm:.4f}", "over all adapted layers"),
    ]
    if loop.best_loss != math.inf:
        facts.append(("Best held-out loss", f"{loop.best_loss:.4f}", f"at step {loop.best_step}"))
    return facts


def _curves(events: Sequence[Event], figures: RunFigures) -> list[Chart]:
    steps = [event for event in events if isinstance(event, Stepped)]
    scored = [event for event in events if isinstance(event, Evaluated)]
    held_out = [(event.step, event.valid_loss) for event in scored]
    right = [(event.step, event.accuracy) for event in scored if event.accuracy is not None]
    raw = [(step.step, step.loss) for step in steps]
    loss = [Series("training", raw, "dots"), Series("training, smoothed", _smoothed(raw), "line")]
    if held_out:
        loss.append(Series("held out", held_out, "line"))
    if spikes := [(event.step, event.loss) for event in events if isinstance(event, Spiked)]:
        loss.append(Series("spikes of single steps", spikes, "dots"))
    rates = [(step.step, step.lr) for step in steps]
    norms = [(step.step, step.grad_norm) for step in steps if step.grad_norm is not None]
    speed = [(step.step, step.tokens_per_second) for step in steps]
    accuracy = (
        [Chart("Accuracy", "step", "of the held-out records", [Series("held out", right, "line")], y_most=1)]
        if right
        else []
    )
    return [
        Chart("Loss", "step", figures.unit, loss, note=_LOSSES.get(figures.unit, "")),
        *accuracy,
        Chart("Learning rate", "step", "", [Series("learning rate", rates, "line")]),
        Chart("Gradient norm", "step", "", [Series("before clipping", norms, "line")]),
        Chart("Speed", "step", f"{figures.counted} per second", [Series("since the last line", speed, "line")]),
    ]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the mean of each point and its neighbours, as many on each side: it lags behind nothing."""
    most = max(1, len(points) // 20)
    smooth = []
    for i, (x, _) in enumerate(points):
        side = min(most, i, len(points) - 1 - i)
        window = [y for _, y in points[i - side : i + side + 1]]
        smooth.append((x, sum(window) / len(window)))
    return smooth


def _examples(samples: Sequence[Sampled], events: Sequence[Event]) -> list[Sample]:
    """Return the samples, with what the adapter said to them during training."""
    answered = [event for event in events if isinstance(event, Answered)]
    return [
        Sample(
            one.prompt, one.reference, one.before, one.after, one.turns,
            [(event.step, event.answers[number]) for event in answered if number < len(event.answers)],
        )
        for number, one in enumerate(samples)
    ]  # fmt: skip


# Classes up to which a matrix is legible
_LEGIBLE = 20


def _classes(scored: HeldOutScores | None) -> list[Table]:
    """Return the scores on the held-out records with their intervals, and of classes those of each with the confusion matrix."""
    if scored is None:
        return []
    rows = [[metric, f"{s.value:.4f}", f"[{s.low:.4f}, {s.high:.4f}]"] for metric, s in scored.scores.items()]
    note = f"Of the adapter that was kept, on {scored.records:,} records. {_INTERVALS}"
    tables = [Table("Held-out scores", ["metric", "score", "95% interval"], rows, note)]
    confusion = scored.confusion
    if confusion is None:
        return tables
    classes: list[list[object]] = [
        [one.name, f"{one.precision:.3f}", f"{one.recall:.3f}", f"{one.f1:.3f}", one.records, one.predicted]
        for one in confusion.classes
    ]
    columns = ["class", "precision", "recall", "F1", "records", "predicted"]
    tables.append(
        Table("Each class", columns, classes, "On the held-out records. A share of no records is shown as 0.")
    )
    if len(confusion.labels) <= _LEGIBLE:
        counts = [[name, *row] for name, row in zip(confusion.labels, confusion.counts, strict=True)]
        note = (
            "Rows are the records' classes, columns what the model takes them for; the color is the share of the row."
        )
        tables.append(Table("Confusion matrix", ["class", *confusion.labels], counts, note, shaded=True, named=True))
    else:
        mistakes = [list(mistake) for mistake in confusion.mistakes[:_LEGIBLE]]
        tables.append(Table("Most frequent mistakes", ["class", "taken for", "records"], mistakes))
    return tables


_INTERVALS = "Intervals are 95%, by bootstrap over items: records with the same prompt are one."


MERGE_COLUMNS = ("layers", "count", "‖ΔW‖ / ‖W0‖", "ΔW kept", "entries changed", "largest change")


def merge_cells(row: Mapping[str, object]) -> list[str]:
    """Return one of `MergeReport.rows()` as text, under MERGE_COLUMNS."""
    return [
        str(row["layers"]), str(row["count"]), f"{row['relative']:.2e}", f"{row['survived']:.2%}", f"{row['changed']:.1%}",
        f"{row['largest_change']:.2e}",
    ]  # fmt: skip


def _merge(figures: RunFigures) -> Table:
    note = "What merging into the weights as they were trained on would do. Kept is the share of ΔW that survives rounding."
    rows = [merge_cells(row) for row in figures.merge_rows]
    return Table(f"A merge into {figures.merge_dtype}", list(MERGE_COLUMNS), rows, note=note)


def _spikes(events: Sequence[Event]) -> list[Table]:
    """Return a table of the steps whose loss was far above those before, if there are any."""
    rows = [
        [
            e.step,
            f"{e.loss:.4f}",
            f"{e.usual:.4f}",
            "" if e.grad_norm is None else f"{e.grad_norm:.3g}",
            shown(e.records, 8),
        ]
        for e in events
        if isinstance(e, Spiked)
    ]
    note = "A few spikes point to records that are unlike the others; many, to a rate that is too high."
    return (
        [Table("Spikes of the loss", ["step", "loss", "before", "gradient norm", "records"], rows, note)]
        if rows
        else []
    )


def _counts(figures: RunFigures) -> Table:
    held = f"Held out: {figures.sets['valid']}." if figures.sets["valid"] else "Nothing is held out."
    rows = [[name, f"{count:,}"] for name, count in figures.data.items()]
    note = f"Trained on {figures.sets['train']}. {held} Tokens are those of the kept records, once."
    return Table("Training data", ["", "count"], rows, note=note)


def _settings(settings: Mapping[str, object]) -> Table:
    rows = [[name, "" if value is None else placeless(str(value))] for name, value in settings.items()]
    return Table("Settings", ["setting", "value"], rows, note="config.yaml reproduces the run.")
