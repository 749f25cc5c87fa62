"""Held-out records with what the base and the adapter say to them."""

from __future__ import annotations

from collections.abc import Sequence

from deltaw.config import GenerateConfig
from deltaw.data import Record
from deltaw.model.switch import using
from deltaw.progress import say
from deltaw.runs.reports.train import Sampled
from deltaw.runs.train.job import Job
from deltaw.training.tasks import task_of

# Long enough for people to see what an adapter changes
_SAMPLE = GenerateConfig(max_new_tokens=96)


def records_to_answer(job: Job) -> list[Record]:
    """Return held-out records with different prompts, of which the wanted answer is known and for which there is room."""
    config, task, loaded = job.prepared.config, task_of(job.prepared.config.data), job.prepared.loaded
    chosen: dict[object, Record] = {}
    for record in job.prepared.valid_records.items if job.prepared.valid_records is not None else ():
        known = task.wanted(record, config.data) is not None and record.form != "text"
        if known and len(chosen) < config.samples and task.fits(loaded, record, config.data, _SAMPLE):
            chosen.setdefault(record.context, record)
    return list(chosen.values())


def answers(job: Job, records: Sequence[Record], adapter: str | None) -> list[str | None]:
    """Return what is said to each record by the adapter, or by the base: nothing where its head is untrained."""
    loaded, data = job.prepared.loaded, job.prepared.config.data
    if not records or (adapter is None and loaded.untrained):
        return [None] * len(records)
    task = task_of(data)
    with using(job.model, adapter):
        who, total = "the base" if adapter is None else "the adapter", len(records)
        say(f"letting {who} answer samples", 0, total)
        answers = task.answer(
            loaded, records, data, _SAMPLE, lambda count: say(f"letting {who} answer samples", count, total)
        )
    return [task.said(answer, data) for answer in answers]


def sampled(
    job: Job, records: Sequence[Record], before: Sequence[str | None], after: Sequence[str | None]
) -> list[Sampled]:
    """Return the records with what was wanted, and what the base and the adapter said."""
    task, data = task_of(job.prepared.config.data), job.prepared.config.data
    wanted = task.learnt(job.prepared.loaded, records, data)
    rows = zip(records, wanted, before, after, strict=True)
    return [Sampled(record.question, reference, base, adapter) for record, reference, base, adapter in rows]
