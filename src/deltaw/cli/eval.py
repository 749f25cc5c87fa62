"""`deltaw eval`: base and adapter side by side."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from deltaw import units
from deltaw.cli import show
from deltaw.cli.flags import Eval
from deltaw.cli.opening import as_trained, open_model
from deltaw.errors import ConfigError


def run(command: Eval) -> None:
    show.quiet_libraries()
    from deltaw.data import read
    from deltaw.files.atomic import check_place, write_text

    if command.out is not None:
        check_place(Path(command.out))
    if not command.base and command.opening.adapter is None:
        raise ConfigError("Nothing to score: --no-base needs an --adapter.")
    records = read(command.data, command.records)
    metrics = _metrics(command, records.form)
    if command.most is not None:
        records = dataclasses.replace(records, items=records.items[: command.most])
    loaded = open_model(command.model, command.opening)
    found = _evaluate(loaded, records, command, metrics)
    show.out.print(_table(found, metrics, command))
    if command.out is not None:
        values = {name: dataclasses.asdict(evaluation) for name, evaluation in found.items()}
        write_text(Path(command.out), json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _metrics(command: Eval, form: str) -> list[str]:
    """The metrics asked for, else all that records of this form allow. Raises ConfigError for one that is not known."""
    from deltaw.study.metrics import METRICS, TEXT_METRICS, check_metrics

    if command.metrics is None:
        metrics = [m for m in METRICS if form != "text" or m not in TEXT_METRICS]
    else:
        metrics = [m.strip() for m in command.metrics.split(",") if m.strip()]
    check_metrics(metrics)
    return metrics


def _evaluate(loaded: Any, records: Any, command: Eval, metrics: list[str]) -> dict[str, Any]:
    """Evaluation of the base, of the adapter, or of both."""
    from deltaw.attached import adapters
    from deltaw.study.evaluate import evaluate
    from deltaw.switching import using

    names = ["base"] * command.base + ["adapter"] * (command.opening.adapter is not None)
    data = as_trained(command.records, command.opening.adapter)
    found = {}
    for name in names:
        with show.err.status(f"scoring the {name} …") as status:

            def progress(count: int, name: str = name, status: Any = status) -> None:
                status.update(f"scoring the {name}: {count} prompts done")

            arguments = (loaded.model, loaded.tokenizer, records, data, command.generation)
            if command.opening.adapter is None:
                found[name] = evaluate(*arguments, metrics=metrics, on_done=progress)
            else:
                with using(loaded.model, adapters(loaded.model)[0] if name == "adapter" else None):
                    found[name] = evaluate(*arguments, metrics=metrics, on_done=progress)
    return found


def _table(found: dict[str, Any], metrics: list[str], command: Eval) -> Any:
    items = next(iter(found.values())).items
    made = show.table("", *found, title=f"{command.data}: {items:,} prompts (95% intervals by bootstrap)")
    for metric in metrics:
        made.add_row(metric.replace("_", " "), *(str(e.scores[metric]) for e in found.values()))
    made.add_row("time", *(units.duration(e.seconds) for e in found.values()))
    return made
