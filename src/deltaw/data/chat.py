"""Conversations → token ids and exactly the assistant's tokens. Knows a tokenizer and its chat template, no file.

Prefixes show where the assistant's text lies. Let W be the rendered conversation. For the assistant message
i, P is the rendering of messages[:i] with the generation prompt, Q that of messages[:i+1]. If P and Q are prefixes of
W as text, *and* their token ids are prefixes of W's token ids, then the ids between are exactly those of the turn,
and what a model is given to generate from (P's ids) is exactly what it was trained after. This holds for every
tokenizer, with or without offsets. A conversation that fails is refused with the reason; nothing is guessed.

A message that begins with the template's BOS or ends with a turn's end already gets no second one. Supervised are the
content and the end-of-turn token (endings.py), not white space that the template puts after that token. In a template
with {% generation %} marks, the text inside the marks is supervised instead (transformers finds it, we check it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltaw.data.endings import Ending, Ids, Turn, tokens_of
from deltaw.data.forms import Message
from deltaw.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENIZED_AT_ONCE = 2000  # texts per call: enough to keep the threads busy, little enough to keep memory flat

Spans = list[tuple[str, str]]
"""For each supervised span: all the text before it, and all the text up to its end."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole conversation in tokens."""

    ids: Ids
    supervised: list[bool]
    endings: list[Ending]
    """One for each assistant's turn."""


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation's text, before tokens are looked at."""

    whole: str
    turns: list[Turn]
    spans: Spans

    @property
    def texts(self) -> list[str]:
        """All texts that have to be tokenized."""
        spans = [text for span in self.spans for text in span]
        return [self.whole, *spans, *(text for turn in self.turns for text in (turn.before, turn.end))]


def encode_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, place: str = "conversation"
) -> tuple[Ids, list[bool]]:
    """Return token ids [t] of a whole conversation and which of them are supervised [t].

    Raises DataError where that cannot be told exactly.
    """
    (conversation,) = encode_chats([messages], tokenizer, [place])
    return conversation.ids, conversation.supervised


def encode_chats(
    conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, places: Sequence[str]
) -> list[Conversation]:
    """Encode many conversations as `encode_chat` does, tokenized together.

    Raises one DataError with every conversation that fails.
    """
    check_template(tokenizer)
    marks = _marks_of(tokenizer)
    return _encoded([marks.without(messages) for messages in conversations], tokenizer, places)


def _encoded(
    conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, places: Sequence[str]
) -> list[Conversation]:
    """Encode conversations whose messages have none of the template's marks in them."""
    encoded: list[Conversation] = []
    problems: list[str] = []
    for at in range(0, len(conversations), _TOKENIZED_AT_ONCE):
        rendered: list[tuple[str, _Rendered]] = []
        for messages, place in zip(conversations[at : at + _TOKENIZED_AT_ONCE], places[at:], strict=False):
            try:
                rendered.append((place, _render_spans(messages, tokenizer)))
            except DataError as error:
                problems.append(f"{place}: {error}")
        ids = tokenized((text for _, one in rendered for text in one.texts), tokenizer)
        read = _Reader(tokenizer, ids)
        for place, one in rendered:
            try:
                encoded.append(read.conversation(one))
            except DataError as error:
                problems.append(f"{place}: {error}")
    if problems:
        share = f"{len(problems)} of {len(conversations)} records"
        raise DataError(f"The assistant's tokens cannot be told exactly in {share}:", problems)
    return encoded


_TRIAL = (Message("user", "Hello"), Message("assistant", "Hello"))


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return the tokens with which the chat template ends an assistant's turn, read off a conversation of two words.

    Empty where plain text ends it, or where the template takes no such conversation.
    """
    try:
        endings = _encoded([_TRIAL], tokenizer, [""])[0].endings
    except DataError:
        return []
    return [token for ending in endings for token in ending.tokens]


@dataclass(frozen=True, slots=True)
class _Marks:
    """Marks that the template puts around messages. A message that has them already gets no second ones."""

    begin: tuple[str, ...]
    end: tuple[str, ...]

    def without(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Return the messages without the marks at their start and end, and white space after these."""
        return tuple(replace(m, content=self._bare(m.content)) for m in messages)

    def _bare(self, content: str) -> str:
        for mark in self.begin:
            content = content.removeprefix(mark)
        last = next((mark for mark in self.end if content.rstrip().endswith(mark)), None)
        return content if last is None else content.rstrip().removesuffix(last)


def _marks_of(tokenizer: PreTrainedTokenizerBase) -> _Marks:
    """Return BOS where the template renders it, and the ends of a turn, with the tokenizer's eos, which would be a second end."""
    ends = [str(word) for word in tokenizer.convert_ids_to_tokens(turn_ends(tokenizer))]
    ends += [tokenizer.eos_token] if ends and tokenizer.eos_token else []
    bos = str(getattr(tokenizer, "bos_token", None) or "")
    try:
        begins = bos != "" and _render(_TRIAL, tokenizer).startswith(bos)
    except DataError:
        begins = False
    return _Marks((bos,) if begins else (), tuple(dict.fromkeys(ends)))


def prompt_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return token ids to generate the next assistant message from: the conversation and the generation prompt.

    Raises DataError where the tokenizer has no chat template, or the template refuses the conversation.
    """
    check_template(tokenizer)
    text = _render(_marks_of(tokenizer).without(messages), tokenizer, prompt=True)
    return tokenized([text], tokenizer)[text]


def tokenized(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Ids]:
    """Return text → token ids, no special tokens added. Equal texts are tokenized once, all of them in few calls."""
    unique = list(dict.fromkeys(texts))
    ids_of: dict[str, Ids] = {}
    for at in range(0, len(unique), _TOKENIZED_AT_ONCE):
        part = unique[at : at + _TOKENIZED_AT_ONCE]
        # verbose=False: the setting too_long answers the tokenizer's warning about length
        ids = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        ids_of.update(zip(part, ids, strict=True))
    return ids_of


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "This tokenizer has no chat template, which chat records need. Use an instruction-tuned model's tokenizer, "
            "or prompt/completion records with template: plain."
        )


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False) -> str:
    """Return the text of a conversation. Raises DataError with the template's message if it refuses, for example roles."""
    try:
        return str(
            tokenizer.apply_chat_template([m.as_dict() for m in messages], tokenize=False, add_generation_prompt=prompt)
        )
    except Exception as error:  # jinja2's errors, and any that a template provokes
        roles = ", ".join(m.role for m in messages) or "none"
        raise DataError(f"the chat template fails on the roles {roles}: {type(error).__name__}: {error}") from error


def _render_spans(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> _Rendered:
    """Return a conversation's text, its assistant's turns, and its supervised spans."""
    whole = _render(messages, tokenizer)
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _render(messages[:i], tokenizer, prompt=True)
        after = whole if i == len(messages) - 1 else _begun(_render(messages[: i + 1], tokenizer), whole, tokenizer)
        name = f"message {i + 1} (assistant)"
        _check_prefix(
            before, whole, f"{name}: the text to generate it from, messages 1 to {i} with the generation prompt,"
        )
        _check_prefix(after, whole, f"{name}: the conversation up to and with it")
        if len(after) <= len(before):
            raise DataError(f"{name}: the template renders no text for it.")
        turns.append(Turn(before, after, message.content))
    if not turns:
        raise DataError("there is no assistant message, so nothing to learn.")
    template, spans = tokenizer.get_chat_template(), [(turn.before, turn.after) for turn in turns]
    if _MARKS.search(template):
        spans = _marked(messages, tokenizer, template, whole, spans)
    return _Rendered(whole, turns, spans)


def _begun(part: str, whole: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the first messages of a conversation as the whole has them.

    Some templates (Phi's) put one eos after the last turn, which is no part of the whole.
    """
    bare = part.removesuffix(tokenizer.eos_token or "")
    return bare if whole.startswith(bare) and not whole.startswith(part) else part


def _check_prefix(part: str, whole: str, what: str) -> None:
    """Raise DataError that shows where `part` leaves `whole`: the template rewrites, drops or adds text as turns follow."""
    if whole.startswith(part):
        return
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole))
    raise DataError(
        f"{what} is not how the whole conversation begins: at character {at + 1} it has {part[at : at + 30]!r}, "
        f"the whole has {whole[at : at + 30]!r}. The template changes a turn once others follow (it drops earlier "
        "thinking, for example). Use a template that keeps turns as they are, or records that end with that turn."
    )


def _marked(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str, whole: str, turns: Spans
) -> Spans:
    """Return the spans inside {% generation %} marks; each must lie in an assistant turn, and each turn must have one."""
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template  # annotated to return a str, and it returns (texts, spans)
    texts, marks = render(
        conversations=[[m.as_dict() for m in messages]],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    if texts[0] != whole:
        raise DataError("the template renders differently each time, so its {% generation %} marks have no place.")
    spans = [(a, b) for a, b in marks[0] if b > a]
    for i, (before, after) in enumerate(turns, 1):
        if not any(len(before) <= a and b <= len(after) for a, b in spans):
            raise DataError(f"assistant message {i}: the template's {{% generation %}} marks enclose nothing of it.")
    for a, b in spans:
        if not any(len(before) <= a and b <= len(after) for before, after in turns):
            raise DataError(
                f"the {{% generation %}} marks enclose {whole[a:b][:30]!r}, which is not in the assistant's turn."
            )
    # each turn's own prompt is checked too, as generation starts from it: an empty span costs nothing
    return [(before, before) for before, _ in turns] + [(whole[:a], whole[:b]) for a, b in spans]


class _Reader:
    """A tokenizer's view of rendered conversations. `ids`: the tokens of all their texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: dict[str, Ids]) -> None:
        self.tokenizer, self.ids = tokenizer, ids
        self.added, self.special = _added_ids(tokenizer), _special_ids(tokenizer)

    def conversation(self, rendered: _Rendered) -> Conversation:
        """Return its tokens [t], which of them lie in its spans [t], and how its turns end.

        Raises DataError where a boundary falls inside a token.
        """
        tokens = self.ids[rendered.whole]
        ends = [tokens_of(turn, self.ids[turn.end], self.special, self.added) for turn in rendered.turns]
        known = self.special.union(*ends)
        mask = [False] * len(tokens)
        for before, after in rendered.spans:
            start, end = (self._boundary(text, rendered.whole) for text in (before, after))
            end = self._without_tail(tokens, start, end, known)
            mask[start:end] = [True] * (end - start)
        if mask[0]:
            raise DataError(
                "the assistant's text is the very first token, which nothing comes before to predict it from."
            )
        return Conversation(tokens, mask, self._endings(rendered, ends, tokens, mask))

    def _endings(self, rendered: _Rendered, ends: Sequence[Ids], tokens: Ids, mask: Sequence[bool]) -> list[Ending]:
        starts = [self._boundary(turn.before, rendered.whole) for turn in rendered.turns]
        endings = []
        for turn, of_turn, start, stop in zip(rendered.turns, ends, starts, [*starts[1:], len(tokens)], strict=True):
            supervised = {tokens[i] for i in range(start, stop) if mask[i]}
            learnt = tuple(token for token in of_turn if token in supervised)
            endings.append(Ending(tuple(of_turn), learnt, turn.text if turn.tail is None else turn.tail))
        return endings

    def _boundary(self, text: str, whole: str) -> int:
        part, tokens = self.ids[text], self.ids[whole]
        if tokens[: len(part)] == part:
            return len(part)
        at = next((i for i, (a, b) in enumerate(zip(part, tokens, strict=False)) if a != b), len(tokens))
        inside = self.tokenizer.convert_ids_to_tokens(tokens[at : at + 1])
        raise DataError(
            f"a token crosses the edge between prompt and answer: before the edge stands {text[-20:]!r}, after it "
            f"{whole[len(text) : len(text) + 20]!r}, and token {at + 1} {inside} covers both. The template or the content "
            "must have a token boundary there (often: no white space at the start or end of the content)."
        )

    def _without_tail(self, tokens: Ids, start: int, end: int, special: frozenset[int]) -> int:
        """Return the span's end without white space after its last special token; without such a token, the end as it is."""
        last = next((i for i in range(end - 1, start - 1, -1) if tokens[i] in special), None)
        if last is None or last == end - 1:
            return end
        tail = str(self.tokenizer.decode(tokens[last + 1 : end], clean_up_tokenization_spaces=False))
        return end if tail.strip() else last + 1


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of special tokens, also of those that only the added-tokens table calls special (<|eot_id|>)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(getattr(tokenizer, "added_tokens_decoder", {}))
