"""How the assistant's turns end: the tokens that a chat template puts there, by which a model that has learnt them stops. Knows
texts and tokens; no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Ids = list[int]


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant's message in a rendered conversation."""

    before: str
    """All the text that it is generated from."""
    after: str
    """All the text up to its end."""
    content: str
    last: bool
    """Whether the conversation ends with it."""

    @property
    def begins_with_content(self) -> bool:
        """Whether the content comes first, as it is, so that what follows is the template's own."""
        return self.after[len(self.before) :].lstrip().startswith(self.content.strip())

    @property
    def tail(self) -> str:
        """What the template puts after the content; all of the turn where that cannot be told."""
        text, content = self.after[len(self.before) :], self.content.strip()
        return text[text.index(content) + len(content) :] if self.begins_with_content else text.rstrip()


@dataclass(frozen=True, slots=True)
class Ending:
    """How a turn ends in tokens."""

    token: int | None
    """What a model can stop at: the template's last token there that is one whole, not part of ordinary text."""
    supervised: bool
    """Whether that token is among those to be learnt."""
    tail: str
    last: bool
    inside: frozenset[int]
    """Tokens of that kind within the answer."""


def token_of(turn: Turn, ids: Mapping[str, Ids], special: Collection[int], added: Collection[int]) -> int | None:
    """The token that ends a turn; None where plain text does. `ids`: of the turn's tail. `added`: all the tokens
    that were added to the vocabulary, which may stand for ordinary words: those of the content end nothing."""
    tokens = ids[turn.tail]
    if not turn.begins_with_content:
        return tokens[-1] if tokens and tokens[-1] in special else None
    return next((token for token in reversed(tokens) if token in special or token in added), None)


def taught(endings: Iterable[Ending]) -> tuple[int, ...]:
    """The tokens that a model trained on these learns to stop at, the most frequent first. One that ends earlier turns alone, and
    stands within other answers as well, ends nothing: a model goes on after it."""
    counts: Counter[int] = Counter()
    final: set[int] = set()
    inside: set[int] = set()
    for ending in endings:
        inside |= ending.inside
        if ending.token is not None and ending.supervised:
            counts[ending.token] += 1
            final |= {ending.token} if ending.last else set()
    return tuple(token for token, _ in counts.most_common() if token in final or token not in inside)


def problem(endings: Sequence[Ending], word_of: Callable[[int], str]) -> str | None:
    """What to tell the user where some turns teach no end. `word_of`: a token's text by its id."""
    plain = [e.tail for e in endings if e.token is None]
    left_out = [word_of(e.token) for e in endings if e.token is not None and not e.supervised]
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
