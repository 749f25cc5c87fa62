"""`deltaw eval`: base and adapter side by side."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Eval
from deltaw.cli.opening import as_trained, open_model, warn_of_no_end
from deltaw.errors import ConfigError
from deltaw.files import units

if TYPE_CHECKING:
    from rich.table import Table

    from deltaw.config import DataConfig
    from deltaw.data import Records
    from deltaw.model.pretrained import Pretrained
    from deltaw.runs.evaluation.bootstrap import ItemScore
    from deltaw.runs.evaluation.evaluate import Evaluation


def run(command: Eval) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.cli import live
    from deltaw.data import read
    from deltaw.data.hold_out import first
    from deltaw.data.records import notes_of
    from deltaw.files.formats.atomic import check_apart, check_place, write_text
    from deltaw.model.pretrained import HEADED, read_config
    from deltaw.training.opening import prepared
    from deltaw.training.tasks import recognised

    if command.out is not None:
        check_apart(
            command.out, {"the model": command.model, "the adapter": command.opening.adapter, "the data": command.data}
        )
        check_place(Path(command.out))
    if not command.base and command.opening.adapter is None:
        raise ConfigError("Nothing to score: --no-base needs an --adapter.")
    data = as_trained(command.records, command.opening.adapter)
    records = read(command.data, data)
    show.notes(notes_of([records]))
    data = recognised(data, records, read_config(command.model, trust_remote_code=command.opening.trust_remote_code))
    metrics = _metrics(command, data, records.form)
    limits = [number for number in (command.most, command.records.max_records) if number is not None]
    if limits:
        records = records.only(first(records.items, min(limits)))
    _warn_of_overlap(records, command.opening.adapter)
    with live.view("loading"):
        loaded = open_model(command.model, command.opening, data)
    if data.task in HEADED and loaded.untrained:
        if command.opening.adapter is None:
            raise ConfigError(
                f"{command.model} has no head for {data.task}, and a random one would be scored. Give an adapter with --adapter."
            )
        command = dataclasses.replace(command, base=False)
    data = prepared(data, records, loaded)
    warn_of_no_end(loaded, records.items, data)
    evaluations = _evaluate(loaded, records, data, command, metrics)
    values = {name: _to_json(evaluation) for name, evaluation in evaluations.items()}
    if command.json:
        scores = {name: {k: v for k, v in of_one.items() if k != "predictions"} for name, of_one in values.items()}
        print(show.as_json(scores))
    else:
        show.out.print(_table(evaluations, metrics, command))
        _print_classes(evaluations)
    if command.out is not None:
        write_text(Path(command.out), json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _to_json(evaluation: Evaluation) -> dict[str, object]:
    """Scores and predictions. An interval that a single item does not allow is null."""
    scores = {
        metric: {name: value if math.isfinite(value) else None for name, value in score.plain().items()}
        for metric, score in evaluation.scores.items()
    }
    confusion = {} if evaluation.confusion is None else {"confusion": evaluation.confusion.to_json()}
    return {
        "records": evaluation.records, "items": evaluation.items, "predictions": evaluation.predictions,
        "seconds": evaluation.seconds, "scores": scores, **confusion,
    }  # fmt: skip


def _warn_of_overlap(records: Records, adapter: str | None) -> None:
    """Say how many prompts the adapter was trained on, if its training data is here."""
    from deltaw.data.prompts import overlap
    from deltaw.files.store import training_of
    from deltaw.training.prepare import trained_on

    trained = trained_on(training_of(adapter)) if adapter is not None else None
    warning = overlap(records.items, trained.items, "evaluated") if trained is not None else None
    if warning is not None:
        show.prose(f"warning: {warning}", style="yellow", console=show.err)


def _metrics(command: Eval, data: DataConfig, form: str) -> list[str]:
    """The metrics asked for, else all that records of this form allow. Raises ConfigError for an unknown one."""
    from deltaw.runs.evaluation.evaluate import metrics_of
    from deltaw.runs.evaluation.metrics import check_metrics

    known = metrics_of(data, form)
    asked = [m.strip() for m in (command.metrics or "").split(",") if m.strip()]
    check_metrics(asked or known, metrics_of(data))
    return asked or list(known)


def _evaluate(
    loaded: Pretrained, records: Records, data: DataConfig, command: Eval, metrics: list[str]
) -> dict[str, Evaluation]:
    """The evaluation of the base, of the adapter, or of both, by name."""
    from deltaw.cli import live
    from deltaw.model.summary import adapters
    from deltaw.model.switch import using
    from deltaw.runs.evaluation.evaluate import evaluate

    names = ["base"] * command.base + ["adapter"] * (command.opening.adapter is not None)
    evaluations = {}
    for name in names:
        with live.view(f"scoring the {name}"):
            opened = loaded.of_base() if name == "base" else loaded
            arguments = (opened.model, opened.tokenizer, records, data, command.generation)
            if command.opening.adapter is None:
                evaluations[name] = evaluate(*arguments, metrics=metrics)
            else:
                with using(loaded.model, adapters(loaded.model)[0] if name == "adapter" else None):
                    evaluations[name] = evaluate(*arguments, metrics=metrics)
    return evaluations


def _table(evaluations: dict[str, Evaluation], metrics: list[str], command: Eval) -> Table:
    one = next(iter(evaluations.values()))
    both = ["adapter less base"] * (len(evaluations) == 2)
    what = f"{one.records:,} records of {one.items:,} items"
    table = show.table("", *evaluations, *both, title=f"{command.data}: {what} (95% intervals by bootstrap over items)")
    for metric in metrics:
        scores = [e.scores[metric] for e in evaluations.values()]
        table.add_row(metric.replace("_", " "), *map(str, scores), *(_difference(metric, *scores) for _ in both))
    table.add_row("time", *(units.duration(e.seconds) for e in evaluations.values()), *("" for _ in both))
    return table


# Classes up to which the confusion matrix fits a terminal
_FIT = 10
_MISTAKES = 10


def _print_classes(evaluations: dict[str, Evaluation]) -> None:
    """Print each class's scores and the confusion matrix; of many classes the most frequent mistakes."""
    for name, evaluation in evaluations.items():
        confusion = evaluation.confusion
        if confusion is None:
            continue
        classes = show.table("class", "precision", "recall", "F1", "records", title=f"\n{name}: each class")
        for one in confusion.classes:
            shares = (f"{share:.3f}" for share in (one.precision, one.recall, one.f1))
            classes.add_row(one.name, *shares, f"{one.records:,}")
        show.out.print(classes)
        if len(confusion.labels) <= _FIT:
            matrix = show.table("class ↓  taken for →", *confusion.labels, title=f"\n{name}: confusion matrix")
            for label, row in zip(confusion.labels, confusion.counts, strict=True):
                matrix.add_row(label, *(f"{count:,}" for count in row))
        else:
            matrix = show.table("class", "taken for", "records", title=f"\n{name}: most frequent mistakes")
            for wanted, said, count in confusion.mistakes[:_MISTAKES]:
                matrix.add_row(wanted, said, f"{count:,}")
        show.out.print(matrix)


def _difference(metric: str, base: ItemScore, adapter: ItemScore) -> str:
    """The adapter's score less the base's, in pairs on the same items."""
    from deltaw.runs.evaluation.bootstrap import paired
    from deltaw.runs.evaluation.metrics import limits

    difference = paired(adapter, base, limits(metric))
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
