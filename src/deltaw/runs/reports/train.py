"""A training run's figures and log as a Report. Knows what a run logs; nothing of HTML, models or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw import __version__
from deltaw.files import units
from deltaw.runs.reports.page import Chart, Report, Sample, Series, Table

_SMOOTH = 0.9
# What a loss in this unit is
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
    before: str | None
    after: str | None


def run_report(
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    samples: Sequence[Sampled],
    *,
    title: str | None = None,
    headline: str | None = None,
    tables: Sequence[Table] = (),
    charts: Sequence[Chart] = (),
    commands: Sequence[str] | None = None,
) -> Report:
    """The report of a run from config.yaml's settings, result.json's figures and log.jsonl's lines; `tables`, `charts` and
    `commands` add to it or, for commands, replace its own."""
    adapter = f"{settings['out']}/adapter"
    return Report(
        title=title or f"{settings['model']} on {settings['data']}",
        headline=headline or _headline(figures, log),
        facts=_facts(figures),
        curves=[*_curves(log, figures), *charts],
        examples=[Sample(s.prompt, s.reference, s.before, s.after) for s in samples],
        tables=[*tables, _merge(figures), _counts(figures), _settings(settings)],
        warnings=list(figures["warnings"]),
        commands=list(commands) if commands is not None else next_commands(settings["model"], adapter, settings),
        footer=f"deltaw {__version__}",
    )  # fmt: skip


def next_commands(model: str, adapter: Any, settings: Mapping[str, Any]) -> list[str]:
    """What to try with an adapter that these settings made."""
    speaks = {"causal": "chat", "seq2seq": "generate"}.get(settings.get("task", "causal"))
    return [
        *([f"deltaw {speaks} {model} --adapter {adapter}"] if speaks else []),
        f"deltaw eval {model} HELD_OUT_DATA --adapter {adapter}",
        f"deltaw merge {model} {adapter} -o MERGED",
    ]


def _headline(figures: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    loop = figures["loop"]
    held_out = [line["valid_loss"] for line in log if line["event"] == "eval"]
    what = (
        f"Held-out loss {held_out[0]:.3f} → {held_out[-1]:.3f}"
        if held_out
        else f"Training loss {loop['first_loss']:.3f} → {loop['last_loss']:.3f}"
    )
    return f"{what} with {units.size(figures['adapter_bytes'])} of update in {units.duration(loop['seconds'])}."


def _facts(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    loop = figures["loop"]
    facts = [
        ("Adapter", units.size(figures["adapter_bytes"]), f"base {units.size(figures['base_bytes'])}"),
        (
            "Trainable",
            f"{figures['trainable_parameters']:,}",
            f"{figures['trainable_share']:.2%} of the base's parameters",
        ),
        ("Time", units.duration(loop["seconds"]), f"{loop['step']} steps, {loop['records']:,} records"),
        (
            "Speed",
            f"{loop['tokens'] / max(loop['step_seconds'], 1e-9):.0f} {figures['counted']}/s",
            f"{loop['tokens']:,} {figures['counted']}, padding not counted",
        ),
        ("Peak memory", units.size(figures["peak_memory"]), "of the process, base included"),
        ("‖ΔW‖ / ‖W0‖", f"{figures['relative_norm']:.4f}", "over all adapted layers"),
    ]
    if loop["best_loss"] is not None:
        facts.append(("Best held-out loss", f"{loop['best_loss']:.4f}", f"at step {loop['best_step']}"))
    return facts


def _curves(log: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> list[Chart]:
    steps = [line for line in log if line["event"] == "step"]
    evals = [line for line in log if line["event"] == "eval"]
    raw = [(line["step"], line["loss"]) for line in steps]
    loss = [Series("training", raw, "dots"), Series("training, smoothed", _smoothed(raw), "line")]
    if evals:
        loss.append(Series("held out", [(line["step"], line["valid_loss"]) for line in evals], "line"))
    norms = [(line["step"], line["grad_norm"]) for line in steps if line["grad_norm"] is not None]
    speed = [(line["step"], line["tokens_per_second"]) for line in steps]
    return [
        Chart("Loss", "step", figures["unit"], loss, note=_LOSSES.get(figures["unit"], "")),
        Chart("Learning rate", "step", "", [Series("learning rate", [(x["step"], x["lr"]) for x in steps], "line")]),
        Chart("Gradient norm", "step", "", [Series("before clipping", norms, "line")]),
        Chart("Speed", "step", f"{figures['counted']} per second", [Series("since the last line", speed, "line")]),
    ]  # fmt: skip


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential moving average, corrected for its start."""
    total = weight = 0.0
    smooth = []
    for x, y in points:
        total, weight = _SMOOTH * total + (1 - _SMOOTH) * y, _SMOOTH * weight + (1 - _SMOOTH)
        smooth.append((x, total / weight))
    return smooth


MERGE_COLUMNS = ("layers", "count", "‖ΔW‖ / ‖W0‖", "ΔW kept", "entries changed", "largest change")


def merge_cells(row: Mapping[str, Any]) -> list[str]:
    """One of `MergeReport.rows()` as text, under MERGE_COLUMNS."""
    return [
        row["layers"], str(row["count"]), f"{row['relative']:.2e}", f"{row['survived']:.2%}", f"{row['changed']:.1%}",
        f"{row['largest_change']:.2e}",
    ]  # fmt: skip


def _merge(figures: Mapping[str, Any]) -> Table:
    note = "What merging into the weights as they were trained on would do. Kept is the share of ΔW that survives rounding."
    rows = [merge_cells(row) for row in figures["merge"]["rows"]]
    return Table(f"A merge into {figures['merge']['dtype']}", list(MERGE_COLUMNS), rows, note=note)


def _counts(figures: Mapping[str, Any]) -> Table:
    sets = figures["sets"]
    held = f"Held out: {sets['valid']}." if sets["valid"] else "Nothing is held out."
    rows = [[name, f"{value:,}"] for name, value in figures["data"].items()]
    note = f"Trained on {sets['train']}. {held} Tokens are those of the kept records, once."
    return Table("Training data", ["", "count"], rows, note=note)


def _settings(settings: Mapping[str, Any]) -> Table:
    rows = [[name, "" if value is None else str(value)] for name, value in settings.items()]
    return Table("Settings", ["setting", "value"], rows, note="config.yaml reproduces the run.")
