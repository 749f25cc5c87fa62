"""Forms that a record may have, and how each becomes a `Record`. Knows no file and no tokenizer.

    prompt       {"prompt": str, "completion": str}
    chat         {"messages": [{"role", "content"}, …]} and other spellings: chats/reading.py
    instruction  {"instruction": str, "input": str (may be missing or empty), "output": str}
    text         {"text": str}
    labelled     {"text": str, "text_pair": str (may be missing), "label": a class's name or number, or a quantity}; and GLUE's
                 names for the texts
    image        {"image": a path, an array [h, w] or [h, w, channels], or a PIL image, "label": as above}

Other names of fields, several answers and earlier turns: fields/. Each `make` returns a Record, or the lines that say why there
is none.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from deltaw.data.chats.messages import Conversation, Message, last_assistant
from deltaw.data.chats.reading import Reading, read_conversation
from deltaw.data.fields.names import VOCABULARY, Named, called, fields_of
from deltaw.data.sources import Fields, show
from deltaw.errors import nearest

Label = str | float | None
"""A class's name or number, or a quantity."""


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


def make(form: str, place: str, fields: Fields, *, completions: bool) -> Record | list[str]:
    """Return one record of a known form, or what is wrong with it (a line each, beginning with `place`)."""
    record = _MAKERS[form](place, fields, completions)
    return record if isinstance(record, Record) else [f"{place}: {line}" for line in record]


def after(record: Record, turns: Sequence[tuple[str, str]]) -> Record:
    """Return a record of a prompt or an instruction as a conversation, after turns of these roles and texts."""
    if record.form == "chat":
        return record
    before = (Message(role, text) for role, text in turns)
    return Record("chat", record.question, record.completion, record.place, (*before, *record.conversation))


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
    names = ["text", *(["text_pair"] if fields.get("text_pair") is not None else [])]
    lines = [line for name in names for line in _text(fields, name)] + _label(fields, completions)
    second = _str(fields, "text_pair")
    return lines or Record("labelled", _str(fields, "text"), None, place, input=second, label=_label_of(fields))


def _image(place: str, fields: Fields, completions: bool) -> Record | list[str]:
    lines = [_missing(fields, "image")] if fields.get("image") is None else []
    lines += _label(fields, completions)
    prompt = _str(fields, "image") or "an image"
    return lines or Record("image", prompt, None, place, label=_label_of(fields), image=fields["image"])


def _label(fields: Fields, wanted: bool) -> list[str]:
    """Return what is wrong with a label, which is a class's name or number, or a quantity."""
    value = fields.get("label")
    if value is None and "label" in fields:
        return (
            [f"field {called(fields, 'label')!r} is null; fill it in, leave the record out, or set task: causal"]
            if wanted
            else []
        )
    if value is None:
        return [_missing(fields, "label")] if wanted else []
    if isinstance(value, str) and value.strip():
        return _text(fields, "label")
    if isinstance(value, numbers.Real) and _is_finite(value):
        return []
    return [
        f"field {called(fields, 'label')!r} must be the name or number of a class, or a quantity, found {show(value)}"
    ]


def _is_finite(value: numbers.Real) -> bool:
    """Return whether a number is one that a float can hold: no NaN, no infinity, no integer of 400 digits."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _chat(place: str, fields: Fields, completions: bool) -> Record | list[str]:
    names = fields.names if isinstance(fields, Named) else {}
    reading = read_conversation(fields, completions=completions, called=names)
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
    value, said = fields.get(name), called(fields, name)
    if name not in fields:
        return [_missing(fields, name)]
    if not isinstance(value, str):
        return [f"field {said!r} must be text, found {show(value)}"]
    if not empty and not value.strip():
        return [f"field {said!r} is empty ({value!r}); fill it in or remove the record"]
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return [
            f"field {said!r} has half a character (unpaired surrogate \\u{ord(value[error.start]):04x} "
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
    there = fields_of(fields)
    spare = [f for f in there if f not in VOCABULARY]  # a field that has its own meaning is no misspelling of another
    said = called(fields, name)
    return f"field {said!r} is missing{nearest(said, spare)}; the record has {', '.join(there) or 'no fields'}"


_MAKERS: dict[str, Callable[[str, Fields, bool], Record | list[str]]] = {
    "prompt": _prompt,
    "chat": _chat,
    "instruction": _instruction,
    "text": _plain_text,
    "labelled": _labelled,
    "image": _image,
}
