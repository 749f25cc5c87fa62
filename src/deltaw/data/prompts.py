"""Items: records whose prompt is the same, as the model gets it. Hold-outs, intervals, references and overlaps all ask here.
Knows records; no tokenizer and no model.

prompt, instruction   the prompt, an instruction with its input
chat                  the tools, and the messages before the first answer to a user: every answer is taught, so conversations that
                      begin alike share an answer's context, and unrolled ones all of it
labelled              the text, or the pair of texts
image                 the picture's bytes
text                  the text itself, as for an empty prompt: nothing is asked, so only copies are one item
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from deltaw.data.forms import Record

_NOUNS = {"text": "texts", "labelled": "texts", "image": "pictures"}


def item_of(record: Record) -> Hashable:
    """Return the item that a record belongs to: records with equal values are of one item."""
    if record.form == "labelled":
        return record.prompt, record.input
    if record.form == "image":
        return _digest(record.image)
    if record.messages is None:
        return question_of(record) if record.question else ("", record.completion)
    turns = record.context
    asked = next((i for i, m in enumerate(turns) if m.role not in ("system", "developer", "assistant")), len(turns))
    answered = next((i for i in range(asked, len(turns)) if turns[i].role == "assistant"), len(turns))
    return (*record.tools, *(m.said for m in turns[:answered]))


def question_of(record: Record) -> Hashable:
    """Return all that stands before the record's last answer.

    Equal questions are of one item and have each other's answers as references. An item of conversations may have several
    questions.
    """
    return (*record.tools, *(m.said for m in record.context))


def item_numbers(records: Sequence[Record]) -> list[int]:
    """Return the number of each record's item, in first-seen order from 0."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(item_of(record), len(numbers)) for record in records]


def items_in(records: Sequence[Record]) -> dict[Hashable, list[int]]:
    """Return item → the numbers of its records, both in first-seen order."""
    members: dict[Hashable, list[int]] = {}
    for i, record in enumerate(records):
        members.setdefault(item_of(record), []).append(i)
    return members


def described(records: Sequence[Record]) -> str:
    """Return the count of records and of their items in words: "300 records of 47 prompts"."""
    if not records:
        return "no records"
    count = len({item_of(record) for record in records})
    return f"{len(records):,} record{'s' * (len(records) > 1)} of {in_words(count, records[0].form)}"


def in_words(count: int, form: str) -> str:
    """Return a count of items of this form in words: "47 prompts"."""
    noun = _NOUNS.get(form, "prompts")
    return f"{count:,} {noun if count != 1 else noun.removesuffix('s')}"


def overlap(held: Sequence[Record], trained: Sequence[Record], what: str = "held-out") -> str | None:
    """Return a warning that says how many items of `held` are in `trained` too; None where there are none."""
    asked, learned = ({item_of(record) for record in records} for records in (held, trained))
    both = len(asked & learned)
    if not both:
        return None
    noun = in_words(len(asked), held[0].form).partition(" ")[2]
    verb = "is" if both == 1 else "are"
    return f"{both:,} of {len(asked):,} {what} {noun} {verb} also trained on: scores on them are too good."


def _digest(image: object) -> str:
    """Return the SHA-256 of a picture's bytes. It is a path, a mapping with a path or bytes, a PIL image, or an array."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or repr(image)
    if isinstance(image, (str, Path)):
        path = Path(image).expanduser()
        image = path.read_bytes() if path.is_file() else str(image).encode()
    if not isinstance(image, bytes):
        array = np.asarray(image)
        image = repr((array.shape, str(array.dtype))).encode() + array.tobytes()
    return hashlib.sha256(image).hexdigest()
