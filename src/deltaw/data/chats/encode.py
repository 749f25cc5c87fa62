"""Conversations → token ids and exactly the assistant's tokens. Knows a tokenizer and its chat template, no file.

Prefixes show where the assistant's text lies. Let W be the rendered conversation up to its last taught message. For the taught
message i, P is the rendering of messages[:i] with the generation prompt, Q that of messages[:i+1]. If P and Q are prefixes of
W as text, *and* their token ids are prefixes of W's token ids, then the ids between are exactly those of the turn,
and what a model is given to generate from (P's ids) is exactly what it was trained after. This holds for every
tokenizer, with or without offsets. A conversation that fails is refused with the reason; nothing is guessed.

Some templates change a turn once others follow: Qwen3's drop earlier thoughts. Then P or Q is no prefix of W, but P is one of Q.
There each taught turn becomes a row of tokens of its own, Q, in the context that a model has in its place.

A message that begins with the template's BOS or ends with a turn's end already gets no second one. Supervised are the
content and the end-of-turn token (endings.py), not white space that the template puts after that token. In a template
with {% generation %} marks, the text inside the marks is supervised instead (transformers finds it, we check it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from deltaw.data.chats.checks import LeftOut, advice_on, left_out, left_out_of_prompt
from deltaw.data.chats.endings import Ending, Ids, Turn, tokens_of
from deltaw.data.chats.messages import Conversation, Message
from deltaw.data.chats.template import Template
from deltaw.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZED_AT_ONCE = 2000  # texts per call: enough to keep the threads busy, little enough to keep memory flat

Spans = list[tuple[str, str]]
"""For each supervised span: all the text before it, and all the text up to its end."""
Turns = Literal["all", "last"]
"""Taught turns of a conversation."""


@dataclass(frozen=True, slots=True)
class InTokens:
    """A conversation in tokens, or one of its taught turns in its context."""

    ids: Ids
    supervised: list[bool]
    endings: list[Ending]
    """One for each taught turn."""
    number: int
    """The number of the conversation among those that were given."""
    place: str
    is_part: bool
    """True for one turn of a conversation whose template changes earlier ones."""


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation's text, before tokens are looked at."""

    number: int
    place: str
    whole: str
    turns: list[Turn]
    spans: Spans
    is_part: bool = False

    @property
    def texts(self) -> list[str]:
        """All texts that have to be tokenized."""
        spans = [text for span in self.spans for text in span]
        return [self.whole, *spans, *(text for turn in self.turns for text in (turn.before, turn.end))]


def encode_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, place: str = "conversation"
) -> tuple[Ids, list[bool]]:
    """Return token ids [t] of a conversation up to its last taught message, and which of them are supervised [t].

    Raises DataError where that cannot be told exactly, and where the template makes several rows of it.
    """
    first, *others = encode_chats([Conversation(tuple(messages))], tokenizer, [place])
    if others:
        raise DataError(f"{place}: the template changes earlier turns, so this conversation is {1 + len(others)} rows.")
    return first.ids, first.supervised


def encode_chats(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    places: Sequence[str],
    *,
    turns: Turns = "all",
) -> list[InTokens]:
    """Return conversations in tokens, in their order, tokenized together.

    Raises one DataError with every conversation that fails.
    """
    template = Template(tokenizer)
    marks = _marks_of(template)
    return _encoded([marks.without(one) for one in conversations], template, places, turns)


def _encoded(
    conversations: Sequence[Conversation], template: Template, places: Sequence[str], turns: Turns = "all"
) -> list[InTokens]:
    """Encode conversations whose messages have none of the template's marks in them."""
    encoded: list[InTokens] = []
    problems: list[str] = []
    lost: list[LeftOut] = []
    failed: set[int] = set()
    for at in range(0, len(conversations), _TOKENIZED_AT_ONCE):
        rendered: list[_Rendered] = []
        for number in range(at, min(at + _TOKENIZED_AT_ONCE, len(conversations))):
            try:
                parts, left = _render_turns(conversations[number], template, number, places[number], turns)
            except DataError as error:
                problems.append(f"{places[number]}: {error}")
                failed.add(number)
                continue
            rendered += parts
            if left:
                problems += [f"{places[number]}: {one.line}" for one in left]
                lost += left
                failed.add(number)
        ids = tokenized((text for one in rendered for text in one.texts), template.tokenizer)
        read = _Reader(template.tokenizer, ids)
        for one in rendered:
            try:
                encoded.append(read.conversation(one))
            except DataError as error:
                problems.append(f"{one.place}: {error}")
                failed.add(one.number)
    if problems:
        share = f"{len(failed)} of {len(conversations)} records"
        raise DataError(
            f"The assistant's tokens cannot be told exactly in {share}:", problems, advice_on(lost) if lost else ""
        )
    return encoded


_TRIAL = Conversation((Message("user", "Hello"), Message("assistant", "Hello")))


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return the tokens with which the chat template ends an assistant's turn, read off a conversation of two words.

    Empty where plain text ends it, or where the template takes no such conversation.
    """
    try:
        endings = _encoded([_TRIAL], Template(tokenizer), [""])[0].endings
    except DataError:
        return []
    return [token for ending in endings for token in ending.tokens]


def prompt_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the chat template puts after a user's text for the model to answer; empty where it takes no such prompt."""
    try:
        text = Template(tokenizer).render(_TRIAL.upto(1), prompt=True)
    except DataError:
        return ""
    return text.rpartition(_TRIAL.messages[0].content)[2].strip()


@dataclass(frozen=True, slots=True)
class _Marks:
    """Marks that the template puts around messages. A message that has them already gets no second ones."""

    begin: tuple[str, ...]
    end: tuple[str, ...]

    def without(self, conversation: Conversation) -> Conversation:
        """Return the conversation without the marks at the start and end of its messages, and white space after these."""
        messages = tuple(replace(m, content=self._bare(m.content)) for m in conversation.messages)
        return replace(conversation, messages=messages)

    def _bare(self, content: str) -> str:
        for mark in self.begin:
            content = content.removeprefix(mark)
        last = next((mark for mark in self.end if content.rstrip().endswith(mark)), None)
        return content if last is None else content.rstrip().removesuffix(last)


def _marks_of(template: Template) -> _Marks:
    """Return BOS where the template renders it, and the ends of a turn, with the tokenizer's eos, which would be a second end."""
    tokenizer = template.tokenizer
    ends = [str(word) for word in tokenizer.convert_ids_to_tokens(turn_ends(tokenizer))]
    ends += [tokenizer.eos_token] if ends and tokenizer.eos_token else []
    bos = str(getattr(tokenizer, "bos_token", None) or "")
    try:
        begins = bos != "" and template.render(_TRIAL).startswith(bos)
    except DataError:
        begins = False
    return _Marks((bos,) if begins else (), tuple(dict.fromkeys(ends)))


def prompt_ids(conversation: Conversation | Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return token ids to generate the next assistant message from: the conversation and the generation prompt.

    Raises DataError where the tokenizer has no chat template, or the template refuses the conversation or leaves a part of it
    out.
    """
    template = Template(tokenizer)
    if not isinstance(conversation, Conversation):
        conversation = Conversation(tuple(conversation))
    conversation = _marks_of(template).without(conversation)
    text = template.render(conversation, prompt=True)
    if lost := left_out_of_prompt(template, conversation, text):
        raise DataError("; ".join([part.line for part in lost]) + f". {advice_on(lost)}")
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


def _render_turns(
    conversation: Conversation, template: Template, number: int, place: str, turns: Turns
) -> tuple[list[_Rendered], list[LeftOut]]:
    """Return a conversation's text with its taught turns; a text for each of them where the template changes earlier turns.

    Second are the parts that the template leaves out: where there are any, no text is returned.
    """
    taught = [i for i, message in enumerate(conversation.messages) if message.is_taught]
    if not taught:
        raise DataError("there is no assistant message, so nothing to learn.")
    taught = [i for i in taught if i > 0]  # a first message answers nothing: there it is context
    if not taught:
        raise DataError(
            "it begins with its only assistant message, so there is nothing that a model answers. Put a user or system message "
            "before it."
        )
    taught = taught[-1:] if turns == "last" else taught
    conversation = conversation.upto(taught[-1] + 1)
    rendered = [(i, _turn(conversation.upto(i + 1), template)) for i in taught]
    lost = left_out(template, conversation, rendered)
    if lost:
        return [], lost
    whole, eos = rendered[-1][1].after, template.tokenizer.eos_token or ""
    joined = [(i, replace(turn, after=_begun(turn.after, whole, eos))) for i, turn in rendered]
    if all(whole.startswith(turn.before) and whole.startswith(turn.after) for _, turn in joined):
        spans = _spans(conversation, template, whole, joined)
        return [_Rendered(number, place, whole, [turn for _, turn in joined], spans)], []
    parts = [
        _Rendered(
            number, f"{place}, message {i + 1}", turn.after, [turn],
            _spans(conversation.upto(i + 1), template, turn.after, [(i, turn)]), is_part=True,
        )
        for i, turn in rendered
    ]  # fmt: skip
    return parts, []


def _turn(conversation: Conversation, template: Template) -> Turn:
    """Return the last message, an assistant's, as rendered. Raises DataError where its context is no prefix of it."""
    count, message = len(conversation.messages), conversation.messages[-1]
    before = template.render(conversation.upto(count - 1), prompt=True)
    after = template.render(conversation)
    name = f"message {count} (assistant)"
    if not after.startswith(before):
        raise DataError(_not_begun(name, before, after))
    if len(after) <= len(before):
        raise DataError(f"{name}: the template renders no text for it.")
    return Turn(before, after, None if message.tool_calls or message.reasoning else message.content)


_BOUNDARY = " A token must end there: often white space at the start or end of the content is to be removed."


def _begun(part: str, whole: str, eos: str) -> str:
    """Return the first messages of a conversation as the whole has them.

    Some templates (Phi's) put one eos after the last turn, which is no part of the whole.
    """
    bare = part.removesuffix(eos)
    return bare if whole.startswith(bare) and not whole.startswith(part) else part


def _not_begun(name: str, before: str, after: str) -> str:
    """Return where the text that a turn is generated from leaves the one that holds the turn."""
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    return (
        f"{name}: the text to generate it from, the messages before it with the generation prompt, is not how the conversation "
        f"with it begins: at character {at + 1} it has {before[at : at + 30]!r}, the conversation {after[at : at + 30]!r}. So "
        "the template teaches something else than a model is asked for. Use one whose generation prompt begins the answer as it "
        "is rendered (TRL has training versions of many), or set the template's variables in chat_template_kwargs, for example "
        '{"enable_thinking": false}.'
    )


def _spans(conversation: Conversation, template: Template, whole: str, rendered: Sequence[tuple[int, Turn]]) -> Spans:
    """Return the supervised spans: the turns, or what lies inside {% generation %} marks in them.

    Each mark must lie in an assistant's turn, and each taught turn must have one. A mark may begin in the generation
    prompt (as in TRL's template for Qwen2.5), which is not supervised, as a model is given it.

    rendered: the number of each taught message, and the turn.
    """
    turns = [turn for _, turn in rendered]
    if not template.has_marks(conversation):
        return [(turn.before, turn.after) for turn in turns]
    text, marks = template.marked(conversation)
    if text != whole:
        raise DataError("the template renders differently each time, so its {% generation %} marks have no place.")
    used: set[tuple[int, int]] = set()
    spans: Spans = []
    for number, turn in rendered:
        start, end = len(turn.before), len(turn.after)
        asked = _asked_at(conversation.upto(number), template, turn)
        inside = [(a, b) for a, b in marks if asked <= a and start < b <= end]
        if not inside:
            raise DataError(
                f"message {number + 1} (assistant): the template's {{% generation %}} marks enclose nothing of it."
            )
        used |= set(inside)
        spans += [(whole[: max(a, start)], whole[:b]) for a, b in inside]
    others = sum(m.role == "assistant" for m in conversation.messages) - len(turns)
    for a, b in marks:
        if (a, b) not in used and not others:  # else it may be in a turn that is not taught here
            raise DataError(
                f"the {{% generation %}} marks enclose {whole[a:b][:30]!r}, which is not in the assistant's turn."
            )
    # each turn's own prompt is checked too, as generation starts from it: an empty span costs nothing
    return [(turn.before, turn.before) for turn in turns] + spans


def _asked_at(context: Conversation, template: Template, turn: Turn) -> int:
    """Return the character at which the generation prompt of a turn begins; its end where that cannot be told."""
    try:
        text = template.render(context)
    except DataError:
        return len(turn.before)
    return len(text) if turn.before.startswith(text) else len(turn.before)


class _Reader:
    """A tokenizer's view of rendered conversations. `ids`: the tokens of all their texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: dict[str, Ids]) -> None:
        self.tokenizer, self.ids = tokenizer, ids
        self.added, self.special = _added_ids(tokenizer), _special_ids(tokenizer)

    def conversation(self, rendered: _Rendered) -> InTokens:
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
        endings = self._endings(rendered, ends, tokens, mask)
        return InTokens(tokens, mask, endings, rendered.number, rendered.place, rendered.is_part)

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
        after = whole[len(text) : len(text) + 20]
        space = (
            " Remove the white space at the start of the answer." if after[:1].isspace() and text[-1:].isspace() else ""
        )
        raise DataError(
            f"a token crosses the edge between prompt and answer: before the edge stands {text[-20:]!r}, after it "
            f"{after!r}, and token {at + 1} {inside} covers both.{space or _BOUNDARY}"
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
