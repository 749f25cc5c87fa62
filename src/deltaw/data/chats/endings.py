"""Ends of the assistant's turns: tokens that a chat template puts there, where a model that learned them stops. Knows texts and
tokens; no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

Ids = list[int]


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant's message in a rendered conversation."""

    before: str
    """All the text that it is generated from."""
    after: str
    """All the text up to its end."""
    content: str | None
    """None where the turn is more than its content: thoughts or tool calls."""

    @property
    def text(self) -> str:
        """The whole turn as rendered."""
        return self.after[len(self.before) :]

    @property
    def tail(self) -> str | None:
        """The template's text after the content; None where the turn does not begin with the content as it is."""
        if self.content is None:
            return None
        content = self.content.strip()
        return self.text.lstrip()[len(content) :] if self.text.lstrip().startswith(content) else None

    @property
    def end(self) -> str:
        """The text whose tokens end the turn: the template's; the whole turn where there is none or it cannot be told."""
        return self.tail if self.tail and self.tail.strip() else self.text.rstrip()


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a turn in tokens."""

    tokens: tuple[int, ...]
    """Tokens that a model can stop at: the template's tokens there that are no part of ordinary text."""
    learnt: tuple[int, ...]
    """The supervised ones among them."""
    text: str
    """The rendered text there, without the content where that can be told."""


def tokens_of(turn: Turn, ids: Ids, special: Collection[int], added: Collection[int]) -> Ids:
    """Return the tokens that end a turn; none where plain text ends it.

    All special tokens after the content do: some templates have two, or one more after a conversation's last turn. Added tokens
    may stand for ordinary words, so the content's end nothing.

    ids: the tokens of the turn's end. special, added: ids of the special tokens, and of all tokens added to the vocabulary.
    """
    if turn.end == turn.tail and (turn.content or "").strip():
        return [token for token in ids if token in special] or [token for token in ids if token in added][-1:]
    return [token for token in ids[-1:] if token in special]


def taught(endings: Iterable[Ending]) -> tuple[int, ...]:
    """Return the tokens that a model trained on these learns to stop at, the most frequent first."""
    counts = Counter(token for ending in endings for token in dict.fromkeys(ending.learnt))
    return tuple(token for token, _ in counts.most_common())


def problem(endings: Sequence[Ending], word_of: Callable[[int], str]) -> str | None:
    """Return what to tell the user where some turns teach no end, else None. `word_of`: a token's text by its id."""
    plain = [e.text for e in endings if not e.tokens]
    left_out = [word_of(e.tokens[0]) for e in endings if e.tokens and not e.learnt]
    never = "A model trained on them does not learn to stop there, and goes on until max_new_tokens"
    told = []
    if plain:
        tail, _ = Counter(plain).most_common(1)[0]
        how = f"no special token but plain text ({_shown(tail)})" if tail.strip() else "no token of its own"
        told.append(f"The chat template ends {len(plain):,} of {len(endings):,} answers in {how}. {never}.")
    if left_out:
        told.append(
            f"The chat template's {{% generation %}} marks leave out what ends {len(left_out):,} of {len(endings):,} answers "
            f"({', '.join(dict.fromkeys(left_out))}). {never} unless the base does so already."
        )
    return "\n".join(told) or None


def _shown(tail: str) -> str:
    return repr(tail if len(tail) <= 30 else f"…{tail[-30:]}")
