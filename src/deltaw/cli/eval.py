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
    from deltaw.pretrained import HEADED, read_config
    from deltaw.tasks import recognised

    if command.out is not None:
        check_place(Path(command.out))
    if not command.base and command.opening.adapter is None:
        raise ConfigError("Nothing to score: --no-base needs an --adapter.")
    data = as_trained(command.records, command.opening.adapter)
    records = read(command.data, data)
    data = recognised(data, records, read_config(command.model))
    metrics = _metrics(command, data, records.form)
    if command.most is not None:
        records = dataclasses.replace(records, items=records.items[: command.most])
    loaded = open_model(command.model, command.opening, data)
    if data.task in HEADED and loaded.untrained:
        if command.opening.adapter is None:
            raise ConfigError(
                f"{command.model} has no head for {data.task} (a random one would be scored). Give an adapter with --adapter."
            )
        command = dataclasses.replace(command, base=False)
    found = _evaluate(loaded, records, data, command, metrics)
    show.out.print(_table(found, metrics, command))
    if command.out is not None:
        values = {name: _as_told(evaluation) for name, evaluation in found.items()}
        write_text(Path(command.out), json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _as_told(evaluation: Any) -> dict[str, Any]:
    """Without the loss of each record."""
    return {name: value for name, value in dataclasses.asdict(evaluation).items() if name != "losses"}


def _metrics(command: Eval, data: Any, form: str) -> list[str]:
    """The metrics asked for, else all that records of this form allow. Raises ConfigError for one that is not known."""
    from deltaw.study.evaluate import metrics_of
    from deltaw.study.metrics import check_metrics

    known = metrics_of(data, form)
    given = [m.strip() for m in (command.metrics or "").split(",") if m.strip()]
    check_metrics(given or known, metrics_of(data))
    return given or list(known)


def _evaluate(loaded: Any, records: Any, data: Any, command: Eval, metrics: list[str]) -> dict[str, Any]:
    """Evaluation of the base, of the adapter, or of both."""
    from deltaw.attached import adapters
    from deltaw.study.evaluate import evaluate
    from deltaw.switching import using

    names = ["base"] * command.base + ["adapter"] * (command.opening.adapter is not None)
    found = {}
    for name in names:
        with show.err.status(f"scoring the {name} …") as status:

            def progress(count: int, name: str = name, status: Any = status) -> None:
                status.update(f"scoring the {name}: {count} done")

            own = loaded.of_base() if name == "base" else loaded
            arguments = (own.model, own.tokenizer, records, data, command.generation)
            if command.opening.adapter is None:
                found[name] = evaluate(*arguments, metrics=metrics, on_done=progress)
            else:
                with using(loaded.model, adapters(loaded.model)[0] if name == "adapter" else None):
                    found[name] = evaluate(*arguments, metrics=metrics, on_done=progress)
    return found


def _table(found: dict[str, Any], metrics: list[str], command: Eval) -> Any:
    items = next(iter(found.values())).items
    made = show.table("", *found, title=f"{command.data}: {items:,} items (95% intervals by bootstrap)")
    for metric in metrics:
        made.add_row(metric.replace("_", " "), *(str(e.scores[metric]) for e in found.values()))
    made.add_row("time", *(units.duration(e.seconds) for e in found.values()))
    return made
