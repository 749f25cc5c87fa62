"""Held-out records after training: what the base and the adapter say to some, and the adapter's scores on all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from deltaw.config import GenerateConfig
from deltaw.data import Record
from deltaw.errors import DataError
from deltaw.model.switch import using
from deltaw.progress import say
from deltaw.runs.evaluation.evaluate import evaluate, metrics_of
from deltaw.runs.evaluation.metrics import installed
from deltaw.runs.reports.train import Sampled
from deltaw.runs.results.train import HeldOutScores
from deltaw.runs.train.job import Job
from deltaw.training.events import Answered, Evaluated, Event
from deltaw.training.tasks import task_of

log = logging.getLogger("deltaw")
# Long enough for people to see what an adapter changes
_SAMPLE = GenerateConfig(max_new_tokens=96)
# Enough to see where training goes
_BRIEF = GenerateConfig(max_new_tokens=32)


def records_to_answer(job: Job) -> list[Record]:
    """Return held-out records with different prompts, of which the wanted answer is known and for which there is room."""
    config, task, loaded = job.prepared.config, task_of(job.prepared.config.data), job.prepared.loaded
    chosen: dict[object, Record] = {}
    for record in job.prepared.valid_records.items if job.prepared.valid_records is not None else ():
        known = task.wanted(record, config.data) is not None and record.form != "text"
        if known and len(chosen) < config.samples and task.fits(loaded, record, config.data, _SAMPLE):
            chosen.setdefault(record.context, record)
    return list(chosen.values())


def answers(
    job: Job, records: Sequence[Record], adapter: str | None, generation: GenerateConfig = _SAMPLE
) -> list[str | None]:
    """Return what is said to each record by the adapter, or by the base: nothing where its head is untrained."""
    loaded, data = job.prepared.loaded, job.prepared.config.data
    if not records or (adapter is None and loaded.untrained):
        return [None] * len(records)
    task = task_of(data)
    with using(job.model, adapter):
        who, total = "the base" if adapter is None else "the adapter", len(records)
        say(f"letting {who} answer samples", 0, total)
        answers = task.answer(
            loaded, records, data, generation, lambda count: say(f"letting {who} answer samples", count, total)
        )
    return [task.said(answer, data) for answer in answers]


def answering(job: Job, records: Sequence[Record], hear: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return `hear`, which after each evaluation also hears what the adapter says to the first records by then."""
    chosen = records[: job.prepared.config.samples_during]

    def hears(event: Event) -> None:
        hear(event)
        if chosen and isinstance(event, Evaluated):
            said = answers(job, chosen, job.adapter, _BRIEF)
            hear(Answered(event.step, [answer or "" for answer in said]))

    return hears


def sampled(
    job: Job, records: Sequence[Record], before: Sequence[str | None], after: Sequence[str | None]
) -> list[Sampled]:
    """Return the records with what was wanted, and what the base and the adapter said."""
    task, data = task_of(job.prepared.config.data), job.prepared.config.data
    wanted = task.learnt(job.prepared.loaded, records, data)
    rows = zip(records, wanted, before, after, strict=True)
    return [
        Sampled(record.question, reference, base, adapter, _turns(record)) for record, reference, base, adapter in rows
    ]


def _turns(record: Record) -> tuple[tuple[str, str], ...]:
    """Return role and text of each turn before the answer, of a conversation with more than one."""
    turns = tuple((message.role, message.text) for message in record.context) if record.messages is not None else ()
    return turns if len(turns) > 1 else ()


def scores(job: Job) -> HeldOutScores | None:
    """Score the adapter on the held-out records: the loss, and of classes and numbers the metrics that are installed.

    None where nothing is held out, or where a loss is not finite.
    """
    prepared = job.prepared
    loaded, data, records = prepared.loaded, prepared.config.data, prepared.valid_records
    if records is None:
        return None
    names = ["loss"] if task_of(data).answers == "text" else [m for m in metrics_of(data) if installed(m)]
    say("scoring the held-out records")
    try:
        with using(job.model, job.adapter):
            outcome = evaluate(
                job.model, loaded.tokenizer, records, data, GenerateConfig(), metrics=names, progress=False
            )
    except DataError as error:
        log.warning("The held-out records have no score: %s", error)
        return None
    return HeldOutScores(outcome.records, dict(outcome.scores), outcome.confusion)
