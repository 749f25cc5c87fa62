"""Conversations → token ids and exactly the assistant's tokens. Knows a tokenizer and its chat template, no file.

Where the assistant's text lies is found with prefixes. Let W be the rendered conversation. For the assistant message
i, P is the rendering of messages[:i] with the generation prompt, Q that of messages[:i+1]. If P and Q are prefixes of
W as text, *and* their token ids are prefixes of W's token ids, then the ids between are exactly those of the turn,
and what a model is given to generate from (P's ids) is exactly what it was trained after. This holds for every
tokenizer, with or without offsets. Whatever fails is refused with the reason; nothing is guessed.

Supervised are the content and the end-of-turn token, not white space that the template puts after that token. In a
template with {% generation %} marks, what the marks enclose is supervised instead (transformers finds it, we check it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from deltaw.data.forms import Message
from deltaw.errors import DataError, listing

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENIZED_AT_ONCE = 2000  # texts per call: enough to keep the threads busy, little enough to keep memory flat

Ids = list[int]
Spans = list[tuple[str, str]]  # per supervised span: all the text before it, and all the text up to its end


def encode_chat(messages: Sequence[Message], tokenizer: Any, *, place: str = "conversation") -> tuple[Ids, list[bool]]:
    """Token ids [t] of a whole conversation and which of them are supervised [t]. DataError where that is not exact."""
    return encode_chats([messages], tokenizer, [place])[0]


def encode_chats(
    conversations: Sequence[Sequence[Message]], tokenizer: Any, places: Sequence[str]
) -> list[tuple[Ids, list[bool]]]:
    """`encode_chat` of many conversations, tokenized together. One DataError lists every conversation that fails."""
    check_template(tokenizer)
    special = _special_ids(tokenizer)
    encoded: list[tuple[Ids, list[bool]]] = []
    problems: list[str] = []
    for at in range(0, len(conversations), _TOKENIZED_AT_ONCE):
        rendered: list[tuple[str, str, Spans]] = []
        for messages, place in zip(conversations[at : at + _TOKENIZED_AT_ONCE], places[at:], strict=False):
            try:
                rendered.append((place, *_render_spans(messages, tokenizer)))
            except DataError as error:
                problems.append(f"{place}: {error}")
        texts = (text for _, whole, spans in rendered for part in ((whole,), *spans) for text in part)
        ids = tokenized(texts, tokenizer)
        for place, whole, spans in rendered:
            try:
                encoded.append((list(ids[whole]), _mask(whole, spans, ids, special, tokenizer)))
            except DataError as error:
                problems.append(f"{place}: {error}")
    if problems:
        share = f"{len(problems)} of {len(conversations)} records"
        raise DataError(listing(f"The assistant's tokens cannot be told exactly in {share}:", problems))
    return encoded


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> Ids:
    """Token ids to generate the next assistant message from: the conversation so far and the generation prompt."""
    check_template(tokenizer)
    text = _render(messages, tokenizer, prompt=True)
    return tokenized([text], tokenizer)[text]


def tokenized(texts: Iterable[str], tokenizer: Any) -> dict[str, Ids]:
    """Text → token ids, no special tokens added; equal texts are tokenized once, all of them in few calls."""
    unique = list(dict.fromkeys(texts))
    found: dict[str, Ids] = {}
    for at in range(0, len(unique), _TOKENIZED_AT_ONCE):
        part = unique[at : at + _TOKENIZED_AT_ONCE]
        # verbose=False: the tokenizer's own warning about length is answered by our too_long policy
        ids = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        found.update(zip(part, ids, strict=True))
    return found


def check_template(tokenizer: Any) -> None:
    """DataError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "This tokenizer has no chat template, which chat records need. Use an instruction-tuned model's tokenizer, "
            "or prompt/completion records with template: plain."
        )


def _render(messages: Sequence[Message], tokenizer: Any, *, prompt: bool = False) -> str:
    """Text of a conversation. DataError with the template's own message if it refuses (roles out of turn, say)."""
    try:
        return tokenizer.apply_chat_template(
            [m.as_dict() for m in messages], tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # jinja2's own, and whatever a template provokes
        roles = ", ".join(m.role for m in messages) or "none"
        raise DataError(f"the chat template fails on the roles {roles}: {type(error).__name__}: {error}") from error


def _render_spans(messages: Sequence[Message], tokenizer: Any) -> tuple[str, Spans]:
    """A conversation's text and its supervised spans, before tokens are looked at."""
    whole = _render(messages, tokenizer)
    turns: Spans = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _render(messages[:i], tokenizer, prompt=True)
        after = whole if i == len(messages) - 1 else _render(messages[: i + 1], tokenizer)
        name = f"message {i + 1} (assistant)"
        _check_prefix(
            before, whole, f"{name}: the text to generate it from, messages 1 to {i} with the generation prompt,"
        )
        _check_prefix(after, whole, f"{name}: the conversation up to and with it")
        if len(after) <= len(before):
            raise DataError(f"{name}: the template renders no text for it.")
        turns.append((before, after))
    if not turns:
        raise DataError("there is no assistant message, so nothing to learn.")
    template = tokenizer.get_chat_template()
    return whole, _marked(messages, tokenizer, template, whole, turns) if _MARKS.search(template) else turns


def _check_prefix(part: str, whole: str, what: str) -> None:
    """DataError that shows where `part` leaves `whole`: the template rewrites, drops or adds text as turns follow."""
    if whole.startswith(part):
        return
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole))
    raise DataError(
        f"{what} is not how the whole conversation begins: at character {at + 1} it has {part[at : at + 30]!r}, "
        f"the whole has {whole[at : at + 30]!r}. The template changes a turn once others follow (it drops earlier "
        "thinking, for instance). Use a template that keeps turns as they are, or records that end with that turn."
    )


def _marked(messages: Sequence[Message], tokenizer: Any, template: str, whole: str, turns: Spans) -> Spans:
    """The spans inside {% generation %} marks; each must lie in an assistant turn, and each turn must have one."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(  # annotated as str, but it is (texts, spans)
        conversations=[[m.as_dict() for m in messages]],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    texts, marks = rendered
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


def _mask(whole: str, spans: Spans, ids: dict[str, Ids], special: frozenset[int], tokenizer: Any) -> list[bool]:
    """Which of the whole's tokens lie in `spans` [t]. DataError where a boundary falls inside a token."""
    tokens = ids[whole]
    mask = [False] * len(tokens)
    for before, after in spans:
        start, end = (_boundary(text, whole, ids, tokenizer) for text in (before, after))
        end = _without_tail(tokens, start, end, special, tokenizer)
        mask[start:end] = [True] * (end - start)
    if mask[0]:
        raise DataError("the assistant's text is the very first token, which nothing comes before to predict it from.")
    return mask


def _boundary(text: str, whole: str, ids: dict[str, Ids], tokenizer: Any) -> int:
    part, tokens = ids[text], ids[whole]
    if tokens[: len(part)] == part:
        return len(part)
    at = next((i for i, (a, b) in enumerate(zip(part, tokens, strict=False)) if a != b), len(tokens))
    inside = tokenizer.convert_ids_to_tokens(tokens[at : at + 1])
    raise DataError(
        f"a token crosses the edge between prompt and answer: before the edge stands {text[-20:]!r}, after it "
        f"{whole[len(text) : len(text) + 20]!r}, and token {at + 1} {inside} covers both. The template or the content "
        "must have a token boundary there (often: no white space at the start or end of the content)."
    )


def _without_tail(tokens: Ids, start: int, end: int, special: frozenset[int], tokenizer: Any) -> int:
    """The span's end without white space after its last special token; without such a token, the end as it is."""
    last = next((i for i in range(end - 1, start - 1, -1) if tokens[i] in special), None)
    if last is None or last == end - 1:
        return end
    tail = tokenizer.decode(tokens[last + 1 : end], clean_up_tokenization_spaces=False)
    return end if tail.strip() else last + 1


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of special tokens, also those that only the added-tokens table calls special (<|eot_id|>)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
