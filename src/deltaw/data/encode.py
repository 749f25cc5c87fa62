"""Records → token ids and which of them are supervised. Knows a tokenizer, no file and no model.

plain   [BOS] prompt+separator | completion EOS    prompt and completion are tokenized apart, so generation, which has
                                                   the prompt alone, sees the very ids that training saw
        [BOS] text EOS                             text records: everything but the first token is supervised
chat    the tokenizer's chat template; see chat.py

BOS is there if the tokenizer adds one by default. Right of the bar is supervised. The first token never is, as nothing
comes before it to predict it from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.config import DataConfig
from deltaw.data import chat
from deltaw.data.forms import Message, Record
from deltaw.data.records import Records
from deltaw.errors import DataError, listing

INSTRUCTION = "### Instruction:\n{prompt}\n\n### Response:\n"
"""What a plain instruction record without an input is prompted with; `separator` follows."""
INSTRUCTION_INPUT = "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
"""The same with an input."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids [t] and which of them the loss is taken over [t]; `supervised[0]` is False."""

    input_ids: list[int]
    supervised: list[bool]
    place: str

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Counts:
    """What became of the records."""

    records: int
    kept: int
    truncated: int
    dropped: int
    tokens: int
    supervised: int
    longest: int
    """Tokens of the longest record kept."""


@dataclass(frozen=True)
class Encoded:
    """Examples in the records' order, and the counts."""

    examples: list[Any]
    """Each an Example, or an Item of another task."""
    counts: Counts
    records: list[int]
    """The number of the record that each example is of: those that were dropped have none."""

    @property
    def lengths(self) -> list[int]:
        return [e.length for e in self.examples]


def encode(records: Records, tokenizer: Any, config: DataConfig) -> Encoded:
    """Every record as an Example. One DataError lists all records that cannot be, and what to do."""
    template = template_of(records.form, tokenizer, config)
    if template == "chat":
        wholes = _chats(records.items, tokenizer, config)
    else:
        wholes = _plains(records.items, tokenizer, config)
    examples: list[Example] = []
    numbers: list[int] = []
    problems: list[str] = []
    truncated = dropped = 0
    bos = _bos(tokenizer)
    for number, whole in enumerate(wholes):
        if len(whole.input_ids) > config.max_length:
            dropped += config.too_long == "drop"
            if config.too_long == "drop":
                continue
            cut = _cut(whole, config, bos=bos, text=records.form == "text")
            if isinstance(cut, str):
                problems.append(f"{whole.place}: {cut}")
                continue
            whole, truncated = cut, truncated + 1
        if not any(whole.supervised):
            problems.append(f"{whole.place}: no token of it is supervised, so there is nothing to learn from it")
            continue
        examples.append(whole)
        numbers.append(number)
    if problems:
        raise DataError(
            listing(f"{records.source}: {len(problems)} of {len(records)} records cannot be encoded:", problems)
        )
    if not examples:
        raise DataError(
            f"{records.source}: all {len(records)} records are longer than max_length ({config.max_length} tokens) "
            "and were dropped. Raise max_length or set too_long: truncate."
        )
    return Encoded(examples, _count(examples, len(records), truncated, dropped), numbers)


def encode_prompt(record: Record, tokenizer: Any, config: DataConfig) -> list[int]:
    """Token ids to generate the record's completion from: what comes before it in `encode`, not truncated."""
    if template_of(record.form, tokenizer, config) == "chat":
        return chat.prompt_ids(with_system(record.context, config.system), tokenizer)
    if record.form == "text":
        raise DataError(f"{record.place}: a text record has no prompt to generate from. Use prompt/completion records.")
    text = plain_prompt(record, config.separator)
    ids = _bos(tokenizer) + chat.tokenized([text], tokenizer)[text]
    if not ids:
        raise DataError(f"{record.place}: {_NO_PROMPT}.")
    return ids


def template_of(form: str, tokenizer: Any, config: DataConfig) -> str:
    """`chat` or `plain`, as `config.template` says. DataError if the form, tokenizer or other settings forbid it."""
    has = bool(getattr(tokenizer, "chat_template", None))
    template = config.template
    if template == "auto":
        template = "chat" if form == "chat" or (form == "instruction" and has) else "plain"
    problems = []
    if template == "chat":
        if form == "text":
            problems.append("text records have no turns; use template: plain (or auto)")
        if config.separator:
            problems.append(f"separator {config.separator!r} has no effect in a chat; remove it or use template: plain")
        if form != "text":
            chat.check_template(tokenizer)
    else:
        if form == "chat":
            problems.append("chat records need template: chat (or auto) and a tokenizer with a chat template")
        if config.system is not None:
            problems.append("system has no effect in a plain template; remove it or use template: chat")
        if form == "text" and config.separator:
            problems.append(f"separator {config.separator!r} has no effect on text records; remove it")
    if problems:
        raise DataError(listing(f"The template {template!r} does not fit {form} records here:", problems))
    return template


def plain_prompt(record: Record, separator: str) -> str:
    """The prompt's text without a chat template."""
    if record.form != "instruction":
        return record.prompt + separator
    form = INSTRUCTION_INPUT if record.input else INSTRUCTION
    return form.format(prompt=record.prompt, input=record.input) + separator


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """The conversation with a system message in front, unless it has one or `system` is None."""
    if system is None or (messages and messages[0].role in ("system", "developer")):
        return tuple(messages)
    return (Message("system", system), *messages)


_NO_PROMPT = (
    "the prompt is empty and this tokenizer begins with no BOS token, so nothing comes before the completion. "
    "Fill in the prompt, set a separator, or use text records"
)


def _chats(items: Sequence[Record], tokenizer: Any, config: DataConfig) -> list[Example]:
    """Tokens after the last supervised one are left out: they teach nothing and cost a pass each."""
    encoded = chat.encode_chats(
        [with_system(r.conversation, config.system) for r in items], tokenizer, [r.place for r in items]
    )
    found = []
    for record, (ids, mask) in zip(items, encoded, strict=True):
        end = len(mask) - mask[::-1].index(True)
        found.append(Example(ids[:end], mask[:end], record.place))
    return found


def _plains(items: Sequence[Record], tokenizer: Any, config: DataConfig) -> list[Example]:
    """Plain examples, prompts and completions tokenized apart; equal prompts once."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "This tokenizer has no eos_token, so a completion could never end. Set one "
            "(tokenizer.eos_token = '<|endoftext|>', say, if the vocabulary has it) or use template: chat."
        )
    bos = _bos(tokenizer)
    prompts = ["" if r.form == "text" else plain_prompt(r, config.separator) for r in items]
    completions = [r.completion or "" for r in items]
    tokens = chat.tokenized([*prompts, *completions], tokenizer)
    found: list[Example] = []
    problems: list[str] = []
    for record, prompt, completion in zip(items, prompts, completions, strict=True):
        before, answer = bos + tokens[prompt], [*tokens[completion], tokenizer.eos_token_id]
        if not before and record.form != "text":
            problems.append(f"{record.place}: {_NO_PROMPT}")
        mask = [False] * len(before) + [True] * len(answer)
        mask[0] = False  # the first token of a text without BOS: nothing predicts it
        found.append(Example(before + answer, mask, record.place))
    if problems:
        raise DataError(listing(f"{len(problems)} of {len(items)} records cannot be encoded:", problems))
    return found


def _bos(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer begins text with it by default, else []."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _cut(example: Example, config: DataConfig, *, bos: list[int], text: bool) -> Example | str:
    """The example in max_length tokens, or why it cannot be cut.

    Left of the prompt goes first, BOS stays. Of a conversation only whole answers stay supervised. A text has no
    prompt: it loses its end, and the end token with it.
    """
    ids, mask, most = example.input_ids, example.supervised, config.max_length
    long = f"it has {len(ids)} tokens, over max_length {most}"
    if config.too_long == "error":
        return f"{long}. Raise max_length, shorten it, or set too_long: truncate or drop"
    if text:
        return Example(ids[:most], mask[:most], example.place)
    head = len(bos) if ids[: len(bos)] == bos else 0
    start = len(ids) - (most - head)
    answer = _start_of_last(mask)
    if answer <= start and not (answer == start and head):
        needed = len(ids) - answer
        return f"{long}, and its last answer alone has {needed}. Raise max_length over {needed}, or set too_long: drop"
    kept = mask[start:]
    if mask[start] and (mask[start - 1] or not head):  # an earlier answer that lost its start, or all that came before
        end = kept.index(False)
        kept[:end] = [False] * end
    return Example(ids[:head] + ids[start:], [False] * head + kept, example.place)


def _start_of_last(mask: list[bool]) -> int:
    """Where the last run of supervised tokens starts."""
    end = len(mask) - mask[::-1].index(True)
    return next((i + 1 for i in range(end - 1, -1, -1) if not mask[i]), 0)


def _count(examples: Sequence[Example], records: int, truncated: int, dropped: int) -> Counts:
    lengths = [len(e.input_ids) for e in examples]
    return Counts(
        records=records,
        kept=len(examples),
        truncated=truncated,
        dropped=dropped,
        tokens=sum(lengths),
        supervised=sum(sum(e.supervised) for e in examples),
        longest=max(lengths),
    )
