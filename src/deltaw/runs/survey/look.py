"""Contents of a data set: its form and sets, copies, overlaps, odd records; with a model, its tokens as training sees them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.config import DataConfig, TrainConfig
from deltaw.data import Record, read
from deltaw.data.encode import Counts, Example
from deltaw.data.fields.names import FIELDS
from deltaw.data.labels import are_quantities, class_name, quantities
from deltaw.data.prompts import described, item_of, items_in, overlap
from deltaw.data.records import notes_of
from deltaw.errors import shown
from deltaw.methods.lora import LoRA
from deltaw.training.prepare import Begun, begin, encoded, held_out_records

if TYPE_CHECKING:
    from datasets import Dataset

_BINS = 16
_RENDERED = 3
_NONE = {"nan", "NaN", "NULL", "null", "None", "<NA>", "#N/A", "N/A"}
# Records that are named of each kind of odd ones
_NAMED = 5


@dataclass(frozen=True)
class Lengths:
    """A histogram of numbers, in bins of equal width."""

    unit: str
    edges: list[int]
    """The first number of each bin, and the number after the last bin."""
    counts: list[int]

    @classmethod
    def of(cls, numbers: Sequence[int], unit: str) -> Lengths:
        """Count numbers from 0 on.

        >>> Lengths.of([1, 1, 2, 40], "tokens").counts[:2]
        [3, 0]
        """
        first = min(numbers, default=0)
        width = max(1, -(-(max(numbers, default=0) - first + 1) // _BINS))
        bins = Counter((number - first) // width for number in numbers)
        last = max(bins, default=0)
        return cls(unit, [first + width * i for i in range(last + 2)], [bins[i] for i in range(last + 1)])


@dataclass(frozen=True)
class Rendered:
    """A record as the model gets it."""

    place: str
    parts: list[tuple[str, bool]]
    """Texts in order, and whether they are taught."""


@dataclass(frozen=True)
class Survey:
    """A look at a data set.

    >>> import deltaw
    >>> look = deltaw.survey("train.jsonl")
    >>> look.form, look.records > 0, look.tokens is None
    ('prompt', True, True)
    """

    source: str
    """File, folder or data set, for messages."""
    form: str
    """Form of the records, such as prompt or chat."""
    fields: str
    """The fields that this form has."""
    records: int
    """Number of records."""
    what: str
    """Records and items in words."""
    held_out: str | None
    """The held-out records in words: of a split or a file, or those that training would hold out; None where there are none."""
    overlap: str | None
    """A warning of held-out prompts that are trained on."""
    copies: int
    """Records that are equal to an earlier one."""
    several: int
    """Items with more than one answer."""
    labels: dict[str, int]
    """Records of each class, the most first; empty for records without labels, and for quantities."""
    notes: tuple[str, ...]
    """Sentences on how fields and files were taken, and on fields that are ignored, with their counts."""
    odd: list[str]
    """Sentences on records that are worth a look, with their places."""
    lengths: Lengths
    """Lengths of the records: in tokens with a model, else in characters."""
    tokens: Counts | None = None
    """Counts of the records in tokens; None without a model."""
    quantities: tuple[float, float] | None = None
    """The smallest and the largest label, where labels are quantities."""
    note: str | None = None
    """A warning of answers that teach no end."""
    template: str = ""
    """chat or plain, as the records are put to this model; empty without one."""
    rendered: tuple[Rendered, ...] = ()
    """First records in the model's tokens, with those that are taught."""

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return dataclasses.asdict(self)


def survey(
    data: str | Path | Sequence[dict[str, object]] | Dataset,
    model: str | Path | None = None,
    config: TrainConfig | None = None,
) -> Survey:
    """Look at records before anything is trained on them.

    Args:
        data: a file, folder, hub data set or list of records, as `train` takes them.
        model: with a model, records are encoded exactly as `train` would encode them for it. It is opened for that.
        config: the settings of training. Default: `TrainConfig()`.

    Returns:
        The form, the sets, copies, overlaps, odd records and lengths.

    Raises:
        DataError: records that cannot be used, all of them named.
        FileError: a model that cannot be opened.

    >>> import deltaw
    >>> look = deltaw.survey("train.jsonl", "model")
    >>> look.template, look.tokens.supervised > 0, len(look.rendered)
    ('chat', True, 3)
    """
    config = config or TrainConfig()
    if model is not None:
        return _in_tokens(data, begin(str(model), data, config, LoRA().positions))
    records, held = read(data, config.data, split=config.data.split), held_out_records(data, config)
    held_items = held.items if held is not None else ()
    look = _of_records(records.items, records.source, held_items, notes_of([records, held]), config.data)
    return dataclasses.replace(look, lengths=Lengths.of([_characters(r) for r in records.items], "characters"))


def _of_records(
    records: Sequence[Record], source: str, held: Sequence[Record], notes: tuple[str, ...], data: DataConfig
) -> Survey:
    """Return what can be said without a model."""
    form = records[0].form
    kept = Counter(_content(record) for record in records)
    answers = [{_answer(records[i]) for i in members} for members in items_in(records).values()]
    labelled = [record for record in records if record.label is not None]
    amounts = _quantities(labelled, source, data)
    labels = Counter(class_name(record.label) for record in labelled if not amounts)
    return Survey(
        source=source,
        form=form,
        fields=FIELDS[form],
        records=len(records),
        what=described(records),
        held_out=described(held) if held else None,
        overlap=overlap(held, records) if held else None,
        copies=len(records) - len(kept),
        several=sum(len(of_item) > 1 for of_item in answers) if form != "text" else 0,
        labels=dict(labels.most_common()),
        quantities=(min(amounts), max(amounts)) if amounts else None,
        notes=notes,
        odd=[*_odd(records), *_alike(labels)],
        lengths=Lengths.of([], "characters"),
    )


def _in_tokens(data: Any, begun: Begun) -> Survey:
    """Return the look at records that are encoded for a model as training does it."""
    prepared, config = encoded(begun, data, LoRA()), begun.config
    held = begun.valid.items if begun.valid is not None else ()
    look = _of_records(begun.train.items, begun.train.source, held, tuple(prepared.sets.notes), config.data)
    return dataclasses.replace(
        look,
        lengths=Lengths.of(prepared.encoded.lengths, "tokens") if config.data.task != "image" else look.lengths,
        tokens=prepared.encoded.counts,
        note=prepared.encoded.note,
        template=str(config.data.template) if config.data.task == "causal" else "",
        rendered=tuple(
            _rendered(example, prepared.loaded.tokenizer)
            for example in prepared.encoded.examples[:_RENDERED]
            if isinstance(example, Example)
        ),
    )


def _rendered(example: Example, tokenizer: Any) -> Rendered:
    """Return an example's text in runs of tokens that are taught, or not."""
    parts: list[tuple[str, bool]] = []
    begun = 0
    for i in range(1, example.length + 1):
        if i == example.length or example.supervised[i] != example.supervised[begun]:
            text = tokenizer.decode(example.input_ids[begun:i], clean_up_tokenization_spaces=False)
            parts.append((str(text), example.supervised[begun]))
            begun = i
    return Rendered(example.place, parts)


def _quantities(labelled: Sequence[Record], source: str, data: DataConfig) -> list[float]:
    """Return the labels as numbers where they are to be learned as such, as training tells it; else none."""
    if data.task in ("classification", "image") or data.labels is not None:
        return []
    if not labelled or labelled[0].form == "image":
        return []
    return quantities(labelled, source) if data.task == "regression" or are_quantities(labelled, source) else []


def _alike(classes: Iterable[str]) -> list[str]:
    """Return a sentence on classes whose names differ in capitals alone."""
    by_name: dict[str, list[str]] = {}
    for name in classes:
        by_name.setdefault(name.casefold(), []).append(name)
    alike = [" and ".join(names) for names in by_name.values() if len(names) > 1]
    return [f"Classes that differ in capitals alone: {shown(alike)}. Are they one?"] if alike else []


def _odd(records: Sequence[Record]) -> list[str]:
    """Return sentences on empty prompts, on answers that repeat their prompt, and on long records."""
    kinds = {
        "have no prompt": [r for r in records if r.form in ("prompt", "instruction") and not r.question.strip()],
        "have an answer that programs write for none (nan, null …)": [
            r for r in records if r.form != "text" and (r.completion or "").strip() in _NONE
        ],
        "answer with the prompt itself": [
            r for r in records if r.form != "text" and r.completion and r.completion.strip() == r.question.strip()
        ],
        "are more than ten times as long as most": _long(records),
    }
    return [
        f"{len(odd):,} of {len(records):,} records {what}: {shown([r.place for r in odd], _NAMED)}."
        for what, odd in kinds.items()
        if odd
    ]


def _long(records: Sequence[Record]) -> list[Record]:
    lengths = sorted(map(_characters, records))
    most = 10 * max(lengths[len(lengths) // 2], 100)
    return [record for record in records if _characters(record) > most]


def _characters(record: Record) -> int:
    if record.messages is not None:
        return sum(len(message.content) for message in record.messages)
    return len(record.question) + len(record.completion or "")


def _answer(record: Record) -> Hashable:
    return record.completion if record.label is None else record.label


def _content(record: Record) -> Hashable:
    return item_of(record), _answer(record), record.messages
