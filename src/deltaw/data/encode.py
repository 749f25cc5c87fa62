"""Records → token ids and the mask of the supervised ones. Knows a tokenizer, no file and no model.

plain   [BOS] prompt+separator | completion EOS    prompt and completion are tokenized apart, so generation, which has
                                                   the prompt alone, sees the very ids that training saw
        [BOS] text EOS                             text records: everything but the first token is supervised
chat    the tokenizer's chat template; see chats/

BOS is there if the tokenizer adds one by default. A text that has its BOS or EOS already gets no second one. Right of the bar
is supervised. The first token never is, as nothing comes before it to predict it from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltaw.config import DataConfig
from deltaw.data.chats import encode as chat
from deltaw.data.chats.endings import problem, taught
from deltaw.data.chats.messages import Message
from deltaw.data.chats.template import Template
from deltaw.data.forms import Record
from deltaw.data.records import Records
from deltaw.errors import DataError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "### Instruction:\n{prompt}\n\n### Response:\n"
"""The prompt of a plain instruction record without an input; `separator` follows."""
INSTRUCTION_INPUT = "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
"""The same with an input."""


@dataclass(frozen=True, slots=True)
class Example:
    """A record in tokens."""

    input_ids: list[int]
    """[t]"""
    supervised: list[bool]
    """[t]; True where the loss is taken. The first is False."""
    place: str

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Counts:
    """Counts of what became of the records."""

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
    """The number of each example's record. Dropped records have none."""
    ends: tuple[int, ...] = ()
    """The tokens that end the answers: a model trained on these stops there."""
    note: str | None = None
    """A warning of answers that teach no end."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [e.length for e in self.examples]


def encode(records: Records, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Encoded:
    """Return every record as an Example. Raises one DataError with all records that cannot be, and what to do."""
    template = template_of(records.form, tokenizer, config)
    note = None
    if template != "chat" and config.turns != "all":
        raise DataError(f"turns: {config.turns} has no effect in a plain template; remove it.")
    if template == "chat":
        rows = _chats(records.items, tokenizer, config)
        wholes, of_record = [_example(row) for row in rows], [row.number for row in rows]
        ends, note = (
            taught([e for row in rows for e in row.endings]),
            _note(records.items, rows, tokenizer, config.system),
        )
    else:
        wholes, ends = _plains(records.items, tokenizer, config), (int(tokenizer.eos_token_id),)
        of_record = list(range(len(wholes)))
    examples: list[Example] = []
    numbers: list[int] = []
    problems: list[str] = []
    truncated = dropped = 0
    bos = _bos(tokenizer)
    for number, whole in zip(of_record, wholes, strict=True):
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
        raise DataError(f"{records.source}: {len(problems)} of {len(records)} records cannot be encoded:", problems)
    if not examples:
        raise DataError(
            f"{records.source}: all {len(records)} records are longer than max_length ({config.max_length} tokens) "
            "and were dropped. Raise max_length or set too_long: truncate."
        )
    return Encoded(examples, _count(examples, len(wholes), truncated, dropped), numbers, ends, note)


def encode_prompt(record: Record, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[int]:
    """Return token ids to generate the record's completion from: those before it in `encode`, not truncated.

    Raises DataError for a record without a prompt.
    """
    if template_of(record.form, tokenizer, config) == "chat":
        return chat.prompt_ids(record.as_chat(with_system(record.context, config.system)), tokenizer)
    if record.form == "text":
        raise DataError(f"{record.place}: a text record has no prompt to generate from. Use prompt/completion records.")
    text = plain_prompt(record, config.separator)
    ids = _begun(_bos(tokenizer), chat.tokenized([text], tokenizer)[text])
    if not ids:
        raise DataError(f"{record.place}: {_NO_PROMPT}.")
    return ids


def encode_prompts(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[list[int]]:
    """Return the token ids of `encode_prompt` for each record. Raises one DataError with every record that has none."""
    for form in dict.fromkeys(record.form for record in records):
        template_of(form, tokenizer, config)
    prompts: list[list[int]] = []
    problems: list[str] = []
    for record in records:
        try:
            prompts.append(encode_prompt(record, tokenizer, config))
        except DataError as error:
            problems += [p if p.startswith(record.place) else f"{record.place}: {p}" for p in error.problems]
    if problems:
        raise DataError(
            f"{len(records) - len(prompts)} of {len(records)} prompts cannot be given to the model:", problems
        )
    return prompts


def prompt_ends(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[int]:
    """Return the tokens that end an answer to these records' prompts: the chat template's, where they are chats."""
    chats = any(template_of(form, tokenizer, config) == "chat" for form in {record.form for record in records})
    return chat.turn_ends(tokenizer) if chats else []


def template_of(form: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """Return `chat` or `plain`, as `config.template` says. Raises DataError if the form, tokenizer or settings forbid it."""
    has = bool(getattr(tokenizer, "chat_template", None))
    template = config.template
    if template == "auto":
        wrapped = form == "instruction" or (form == "prompt" and config.separator is None)
        template = "chat" if form == "chat" or (wrapped and has) else "plain"
    problems = []
    if template == "chat":
        if form == "text":
            problems.append("text records have no turns; use template: plain (or auto)")
        if config.separator:
            problems.append(f"separator {config.separator!r} has no effect in a chat; remove it or use template: plain")
        if form != "text":
            Template(tokenizer)  # raises where there is none
    else:
        if form == "chat":
            problems.append("chat records need template: chat (or auto) and a tokenizer with a chat template")
        if config.system is not None:
            problems.append("system has no effect in a plain template; remove it or use template: chat")
        if form == "text" and config.separator:
            problems.append(f"separator {config.separator!r} has no effect on text records; remove it")
    if problems:
        raise DataError(f"The template {template!r} does not fit {form} records here:", problems)
    return template


def check_unwrapped(records: Records, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError for prompts that are in the chat template already: they would be put into it twice."""
    end = chat.prompt_end(tokenizer) if records.form == "prompt" else ""
    twice = [record.place for record in records if end and record.prompt.rstrip().endswith(end)]
    if twice:
        raise DataError(
            f"{records.source}: {len(twice):,} of {len(records):,} prompts ({shown(twice)}) end as the chat template does "
            f"({end!r}), and would be put into it a second time. Set template: plain to take them as they are, or template: chat "
            "if that is meant."
        )


def plain_prompt(record: Record, separator: str | None) -> str:
    """Return the prompt's text without a chat template."""
    if record.form != "instruction":
        return record.prompt + (separator or "")
    form = INSTRUCTION_INPUT if record.input else INSTRUCTION
    return form.format(prompt=record.prompt, input=record.input) + (separator or "")


def usual_separator(records: Sequence[Record]) -> str:
    """Return what stands between prompts and completions by default: a newline, unless white space is there already."""
    spaced = any(r.prompt[-1:].isspace() or (r.completion or "")[:1].isspace() for r in records)
    return "\n" if records and records[0].form == "prompt" and not spaced else ""


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids with one EOS at the end: the text's, without white space after it, or one that is added."""
    end = tokenizer.eos_token_id
    last = len(ids) - ids[::-1].index(end) if end in ids else 0
    if last and not str(tokenizer.decode(ids[last:], clean_up_tokenization_spaces=False)).strip():
        return ids[:last]
    return [*ids, end]


def as_said(completions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return completions as a model says them: without an end token in their text, and white space after it."""
    chats = bool(getattr(tokenizer, "chat_template", None))
    ends = [*tokenizer.convert_ids_to_tokens(chat.turn_ends(tokenizer) if chats else []), tokenizer.eos_token]
    bare_ones = []
    for completion in completions:
        bare = completion.rstrip()
        last = next((end for end in ends if end and bare.endswith(end)), None)
        bare_ones.append(completion if last is None else bare.removesuffix(last))
    return bare_ones


def as_taught(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[str | None]:
    """Return each record's last answer as a model that learnt it writes it; None where a record has none.

    In a chat template that is the rendered turn: with thoughts, and with tool calls in the template's own words.
    """
    answers = [record.completion for record in records]
    chats = [
        i for i, record in enumerate(records)
        if record.completion is not None and template_of(record.form, tokenizer, config) == "chat"
    ]  # fmt: skip
    rows = _chats([records[i] for i in chats], tokenizer, replace(config, turns="last")) if chats else []
    for i, row in zip(chats, rows, strict=True):
        start, end = row.supervised.index(True), len(row.supervised) - row.supervised[::-1].index(True)
        answers[i] = str(tokenizer.decode(row.ids[start:end], skip_special_tokens=True))
    others = [i for i, answer in enumerate(answers) if answer is not None and i not in set(chats)]
    for i, said in zip(others, as_said([answers[i] or "" for i in others], tokenizer), strict=True):
        answers[i] = said
    return answers


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Return the conversation with a system message in front, unless it has one or `system` is None."""
    if system is None or (messages and messages[0].role in ("system", "developer")):
        return tuple(messages)
    return (Message("system", system), *messages)


_NO_PROMPT = (
    "the prompt is empty and this tokenizer begins with no BOS token, so nothing comes before the completion. "
    "Fill in the prompt, set a separator, or use text records"
)


def _chats(items: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[chat.InTokens]:
    """Return the records in tokens: one row each, or one for each answer where the template changes earlier ones."""
    conversations = [record.as_chat(with_system(record.conversation, config.system)) for record in items]
    return chat.encode_chats(conversations, tokenizer, [record.place for record in items], turns=config.turns)


def _example(row: chat.InTokens) -> Example:
    """Return a row without the tokens after the last supervised one: they teach nothing and cost time."""
    end = len(row.supervised) - row.supervised[::-1].index(True)
    return Example(row.ids[:end], row.supervised[:end], row.place)


def _note(
    items: Sequence[Record], rows: Sequence[chat.InTokens], tokenizer: PreTrainedTokenizerBase, system: str | None
) -> str | None:
    """Return what to tell the user about these conversations, a line each: no end that is taught, turns apart, greetings."""
    endings = [ending for row in rows for ending in row.endings]
    told = [problem(endings, lambda token: str(tokenizer.convert_ids_to_tokens(token)))]
    first = sum(record.conversation[0].is_taught for record in items) if system is None else 0
    if first:
        told.append(
            f"{first:,} of {len(items):,} conversations begin with the assistant. Nothing stands before that message to answer, "
            "so it is context and not taught."
        )
    parts = [row.number for row in rows if row.is_part]
    if parts:
        told.append(
            "The chat template changes earlier turns once others follow (it drops their thoughts, for example). So each of "
            f"the {len(parts):,} answers in {len(set(parts)):,} of {len(items):,} conversations is a record of its own, in the "
            "context that a model has in its place. To train on the last answers alone, set turns: last."
        )
    return "\n".join(text for text in told if text) or None


def _plains(items: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[Example]:
    """Return plain examples, prompts and completions tokenized apart; equal prompts once."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "This tokenizer has no eos_token, so a completion could never end. Set one that the vocabulary has "
            "(for example tokenizer.eos_token = '<|endoftext|>'), or use template: chat."
        )
    bos = _bos(tokenizer)
    prompts = ["" if r.form == "text" else plain_prompt(r, config.separator) for r in items]
    completions = [r.completion or "" for r in items]
    tokens = chat.tokenized([*prompts, *completions], tokenizer)
    examples: list[Example] = []
    problems: list[str] = []
    for record, prompt, completion in zip(items, prompts, completions, strict=True):
        before, answer = _begun(bos, tokens[prompt]), tokens[completion]
        if before == bos and answer[:1] == bos:  # a text's own BOS
            answer = answer[1:]
        answer = ended(answer, tokenizer)
        if not before and record.form != "text":
            problems.append(f"{record.place}: {_NO_PROMPT}")
        mask = [False] * len(before) + [True] * len(answer)
        mask[0] = False  # the first token of a text without BOS: nothing predicts it
        examples.append(Example(before + answer, mask, record.place))
    if problems:
        raise DataError(f"{len(problems)} of {len(items)} records cannot be encoded:", problems)
    return examples


def _begun(bos: list[int], ids: list[int]) -> list[int]:
    """Return the ids with BOS in front, where the tokenizer puts one there and the text has none."""
    return list(ids) if bos and ids[:1] == bos else [*bos, *ids]


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [BOS] if the tokenizer begins text with it by default, else []."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _cut(example: Example, config: DataConfig, *, bos: list[int], text: bool) -> Example | str:
    """Return the example in max_length tokens, or why it cannot be cut.

    The left of the prompt is cut, BOS stays. In a conversation only whole answers stay supervised. A text has no prompt: it loses
    its end, and the end token with it.
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
    """Return the index where the last run of supervised tokens starts."""
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
