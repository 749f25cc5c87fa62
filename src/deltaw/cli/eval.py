"""`deltaw eval`: base and adapter side by side."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from deltaw.cli import show
from deltaw.cli.flags import Eval
from deltaw.cli.opening import as_trained, open_model, warn_of_no_end
from deltaw.errors import ConfigError
from deltaw.files import units


def run(command: Eval) -> None:
    show.quiet_libraries()
    from deltaw.data import read
    from deltaw.data.hold_out import first
    from deltaw.files.formats.atomic import check_place, write_text
    from deltaw.model.pretrained import HEADED, read_config
    from deltaw.training.tasks import recognised

    if command.out is not None:
        check_place(Path(command.out))
    if not command.base and command.opening.adapter is None:
        raise ConfigError("Nothing to score: --no-base needs an --adapter.")
    data = as_trained(command.records, command.opening.adapter)
    records = read(command.data, data)
    data = recognised(data, records, read_config(command.model))
    metrics = _metrics(command, data, records.form)
    if command.most is not None:
        records = records.only(first(records.items, command.most))
    _warn_of_overlap(records, command.opening.adapter)
    loaded = open_model(command.model, command.opening, data)
    if data.task in HEADED and loaded.untrained:
        if command.opening.adapter is None:
            raise ConfigError(
                f"{command.model} has no head for {data.task} (a random one would be scored). Give an adapter with --adapter."
            )
        command = dataclasses.replace(command, base=False)
    warn_of_no_end(loaded, records.items, data)
    found = _evaluate(loaded, records, data, command, metrics)
    show.out.print(_table(found, metrics, command))
    if command.out is not None:
        values = {name: _as_told(evaluation) for name, evaluation in found.items()}
        write_text(Path(command.out), json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _as_told(evaluation: Any) -> dict[str, Any]:
    """Without what each record and item adds; an interval that a single item does not allow is null."""
    plain = {
        "records": evaluation.records, "items": evaluation.items, "predictions": evaluation.predictions,
        "seconds": evaluation.seconds,
    }  # fmt: skip
    scores = {name: score.plain() for name, score in evaluation.scores.items()}
    return plain | {
        "scores": {name: {k: v if math.isfinite(v) else None for k, v in own.items()} for name, own in scores.items()}
    }


def _warn_of_overlap(records: Any, adapter: str | None) -> None:
    """Say how many prompts the adapter was trained on, where its training data is here."""
    from deltaw.data.prompts import overlap
    from deltaw.files.store import training_of
    from deltaw.training.prepare import trained_on

    trained = trained_on(training_of(adapter)) if adapter is not None else None
    warning = overlap(records.items, trained.items, "evaluated") if trained is not None else None
    if warning is not None:
        show.prose(f"warning: {warning}", style="yellow", console=show.err)


def _metrics(command: Eval, data: Any, form: str) -> list[str]:
    """The metrics asked for, else all that records of this form allow. Raises ConfigError for one that is not known."""
    from deltaw.runs.evaluation.evaluate import metrics_of
    from deltaw.runs.evaluation.metrics import check_metrics

    known = metrics_of(data, form)
    given = [m.strip() for m in (command.metrics or "").split(",") if m.strip()]
    check_metrics(given or known, metrics_of(data))
    return given or list(known)


def _evaluate(loaded: Any, records: Any, data: Any, command: Eval, metrics: list[str]) -> dict[str, Any]:
    """Evaluation of the base, of the adapter, or of both."""
    from deltaw.model.summary import adapters
    from deltaw.model.switch import using
    from deltaw.runs.evaluation.evaluate import evaluate

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
    one = next(iter(found.values()))
    both = ["adapter less base"] * (len(found) == 2)
    what = f"{one.records:,} records of {one.items:,} items"
    made = show.table("", *found, *both, title=f"{command.data}: {what} (95% intervals by bootstrap over items)")
    for metric in metrics:
        scores = [e.scores[metric] for e in found.values()]
        made.add_row(metric.replace("_", " "), *map(str, scores), *(_difference(*scores) for _ in both))
    made.add_row("time", *(units.duration(e.seconds) for e in found.values()), *("" for _ in both))
    return made


def _difference(base: Any, adapter: Any) -> str:
    """In pairs, on the same items."""
    from deltaw.runs.evaluation.bootstrap import paired

    found = paired(adapter, base)
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
