"""Forms that a record may have, and how each becomes a `Record`. Knows no file and no tokenizer.

    prompt       {"prompt": str, "completion": str}
    chat         {"messages": [{"role", "content"}, …]} and other spellings: chats/reading.py
    instruction  {"instruction": str, "input": str (may be missing or empty), "output": str}
    text         {"text": str}
    labelled     {"text": str, "text_pair": str (may be missing), "label": a class's name or number, or a quantity}; and GLUE's
                 names for the texts
    image        {"image": a path, an array [h, w] or [h, w, channels], or a PIL image, "label": as above}

Other fields are ignored. Each `make` returns a Record, or the lines that say why there is none.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from deltaw.data.chats.messages import Conversation, Message, last_assistant
from deltaw.data.chats.reading import Reading, holds_conversation, in_lists, read_conversation
from deltaw.data.sources import Fields, Row, show
from deltaw.errors import DataError, nearest

FIELDS: dict[str, str] = {
    "prompt": "prompt, completion",
    "chat": "messages (or conversations), and if need be tools",
    "instruction": "instruction, output, and if need be input",
    "text": "text",
    "labelled": "text, label, and of pairs text_pair",
    "image": "image, label",
}
Label = str | float | None
"""A class's name or number, or a quantity."""
PAIRS = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("sentence", None), ("text", None),
)  # fmt: skip
"""Names of a labelled record's texts; the first pair that is there counts."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record; `form` is one of FIELDS.

    prompt: `prompt` and `completion`.
    instruction: the instruction is `prompt`, with its `input`.
    text: `prompt` is empty and `completion` is the text.
    chat: `messages` is the whole conversation, `completion` the last assistant message, and `prompt` the last message before it,
    for people to read; the model sees `context`.
    labelled: `prompt` is the text, `input` the second one of a pair, with a `label`.
    image: `image`, with a `label`.

    `completion` and `label` are None only where prompts alone were asked for.
    """

    form: str
    prompt: str
    completion: str | None
    place: str
    """The file and line, or the number in a list, for messages."""
    messages: tuple[Message, ...] | None = None
    input: str = ""
    label: Label = None
    image: object = None
    tools: tuple[str, ...] = ()
    """JSON schemas of the tools on offer in a chat."""
    settings: str = "{}"
    """Further variables of a chat's template: a JSON object."""
    unused: tuple[str, ...] = ()
    """Names of a chat's fields that say nothing to training."""

    @property
    def question(self) -> str:
        """The prompt as people read it: an instruction with its input."""
        return f"{self.prompt}\n\n{self.input}" if self.input else self.prompt

    @property
    def context(self) -> tuple[Message, ...]:
        """The conversation that the completion answers; one user message for records of other forms than chat."""
        if self.messages is None:
            return (Message("user", self.question),)
        return self.messages if self.completion is None else self.messages[: last_assistant(self.messages)]

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The whole record as a conversation."""
        if self.messages is not None:
            return self.messages
        answer = () if self.completion is None else (Message("assistant", self.completion),)
        return (*self.context, *answer)

    def as_chat(self, messages: tuple[Message, ...]) -> Conversation:
        """Return messages of this record as a template takes them: with its tools and settings."""
        return Conversation(messages, self.tools, self.settings)


def recognise(rows: Sequence[Row], source: str, *, completions: bool, labels: bool = True) -> str:
    """Return the form that the first records have. Without `labels`, a label is a field like any other.

    Raises DataError, with the fields, if they have no form or more than one.
    """
    first = [fields for _, fields in rows[:20]]
    counts = Counter(form for fields in first for form in _fits(fields, completions, labels))
    there = list(dict.fromkeys(str(field) for fields in first for field in fields))
    most = max(counts.values(), default=0)
    forms = [form for form in FIELDS if counts[form] == most and most]
    if forms == ["text"] and labels and completions and any(fields.get("label") is not None for _, fields in rows):
        return "labelled"  # so that each one without a label is named
    if len(forms) == 1:
        return forms[0]
    known = "\n".join(f"  - {form}: {fields}" for form, fields in FIELDS.items())
    if forms:
        raise DataError(
            f"{source}: the fields {', '.join(there)} fit more than one form: {', '.join(forms)}. "
            f"Set form to the one you mean. Forms and their fields:\n{known}"
        )
    near = "".join(f"\n  - {f!r}{nearest(f, _KNOWN)}" for f in there if f not in _KNOWN and nearest(f, _KNOWN))
    names = ", ".join(there) or "(none)"
    tail = f"\nNear misses:{near}" if near else ""
    raise DataError(f"{source}: no known form has the fields {names}. Rename them to those of one form:\n{known}{tail}")


def _fits(fields: Fields, completions: bool, labels: bool) -> list[str]:
    need = {
        "prompt": ("prompt", "completion") if completions else ("prompt",),
        "instruction": ("instruction", "output") if completions else ("instruction",),
        "text": ("text",),
    }
    forms = [form for form, names in need.items() if all(fields.get(n) is not None for n in names)]
    if (
        labels and "label" in fields and (completions or fields["label"] is not None)
    ):  # a null one is named when it is read
        forms = [f for f in forms if f != "text"]
        forms += ["labelled"] * (texts_of(fields) is not None) + ["image"] * (fields.get("image") is not None)
    if in_lists(fields, completions=completions):
        forms = [f for f in forms if f != "prompt"]
    return forms + ["chat"] * holds_conversation(fields, completions=completions)


def texts_of(fields: Fields) -> tuple[str, str | None] | None:
    """Return the names of a labelled record's text, and of the second one of a pair."""
    there = [pair for pair in PAIRS if all(fields.get(name) is not None for name in pair if name is not None)]
    return there[0] if there else None


def make(form: str, place: str, fields: Fields, *, completions: bool) -> Record | list[str]:
    """Return one record of a known form, or what is wrong with it (a line each, beginning with `place`)."""
    record = _MAKERS[form](place, fields, completions)
    return record if isinstance(record, Record) else [f"{place}: {line}" for line in record]


def _prompt(place: str, fields: Fields, completions: bool) -> Record | list[str]:
    lines = _text(fields, "prompt", empty=True) + _answer(fields, "completion", completions)
    return lines or Record("prompt", _str(fields, "prompt"), _str(fields, "completion") if completions else None, place)


def _instruction(place: str, fields: Fields, completions: bool) -> Record | list[str]:
    lines = _text(fields, "instruction") + _answer(fields, "output", completions)
    if fields.get("input") is not None:
        lines += _text(fields, "input", empty=True)
    answer = _str(fields, "output") if completions else None
    return lines or Record("instruction", _str(fields, "instruction"), answer, place, input=_str(fields, "input"))


def _plain_text(place: str, fields: Fields, completions: bool) -> Record | list[str]:
    if not completions:
        return ["a text record has no prompt to complete; give it as {'prompt': …}"]
    return _text(fields, "text") or Record("text", "", _str(fields, "text"), place)


def _labelled(place: str, fields: Fields, completions: bool) -> Record | list[str]:
    names = texts_of(fields) or ("text", None)
    lines = [line for name in names if name is not None for line in _text(fields, name)] + _label(fields, completions)
    second = _str(fields, names[1]) if names[1] is not None else ""
    return lines or Record("labelled", _str(fields, names[0]), None, place, input=second, label=_label_of(fields))


def _image(place: str, fields: Fields, completions: bool) -> Record | list[str]:
    lines = [_missing(fields, "image")] if fields.get("image") is None else []
    lines += _label(fields, completions)
    prompt = _str(fields, "image") or "an image"
    return lines or Record("image", prompt, None, place, label=_label_of(fields), image=fields["image"])


def _label(fields: Fields, wanted: bool) -> list[str]:
    """Return what is wrong with a label, which is a class's name or number, or a quantity."""
    value = fields.get("label")
    if value is None and "label" in fields:
        return ["field 'label' is null; fill it in, leave the record out, or set task: causal"] if wanted else []
    if value is None:
        return [_missing(fields, "label")] if wanted else []
    if isinstance(value, str) and value.strip():
        return _text(fields, "label")
    if isinstance(value, numbers.Real) and _is_finite(value):
        return []
    return [f"field 'label' must be the name or number of a class, or a quantity, found {show(value)}"]


def _is_finite(value: numbers.Real) -> bool:
    """Return whether a number is one that a float can hold: no NaN, no infinity, no integer of 400 digits."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _chat(place: str, fields: Fields, completions: bool) -> Record | list[str]:
    reading = read_conversation(fields, completions=completions)
    if not isinstance(reading, Reading):
        return reading
    conversation, messages = reading.conversation, reading.conversation.messages
    answer = last_assistant(messages)
    waits = not completions and messages[-1].role != "assistant"  # a conversation that waits for its answer
    before = messages[-1:] if waits else messages[max(0, answer - 1) : answer]
    return Record(
        "chat", before[0].text if before else "", None if waits else messages[answer].text, place, messages,
        tools=conversation.tools, settings=conversation.settings, unused=reading.unused,
    )  # fmt: skip


def _answer(fields: Fields, name: str, wanted: bool) -> list[str]:
    return _text(fields, name) if wanted else []


def _text(fields: Fields, name: str, *, empty: bool = False) -> list[str]:
    """Return what is wrong with a text field: nothing, or one line."""
    value = fields.get(name)
    if name not in fields:
        return [_missing(fields, name)]
    if not isinstance(value, str):
        return [f"field {name!r} must be text, found {show(value)}"]
    if not empty and not value.strip():
        return [f"field {name!r} is empty ({value!r}); fill it in or remove the record"]
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return [
            f"field {name!r} has half a character (unpaired surrogate \\u{ord(value[error.start]):04x} "
            f"at character {error.start + 1}); write the whole character"
        ]
    return []


def _str(fields: Fields, name: str) -> str:
    """Return a text field that was found to be right; empty where it may be missing."""
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def _label_of(fields: Fields) -> Label:
    """Return the label, which was found to be right where it is wanted."""
    return cast(Label, fields.get("label"))


def _missing(fields: Fields, name: str) -> str:
    there = [str(f) for f in fields]
    spare = [f for f in there if f not in _KNOWN]  # a field that has its own meaning is no misspelling of another
    return f"field {name!r} is missing{nearest(name, spare)}; the record has {', '.join(there) or 'no fields'}"


_KNOWN = (
    "prompt",
    "completion",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "text",
    "text_pair",
    "label",
    "image",
)

_MAKERS: dict[str, Callable[[str, Fields, bool], Record | list[str]]] = {
    "prompt": _prompt,
    "chat": _chat,
    "instruction": _instruction,
    "text": _plain_text,
    "labelled": _labelled,
    "image": _image,
}
