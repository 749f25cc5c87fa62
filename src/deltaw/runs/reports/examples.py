"""Completions before and after, side by side, with marked differences. Knows texts; nothing of models or scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from deltaw.runs.reports.markup import tag, text

_SHOWN = 6
_LONG, _LINES, _PREVIEW = 700, 14, 240
_MOST_WORDS = 400
_ALIKE = 0.3
_WORD = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Sample:
    """A prompt with the completions of the base (before) and of the adapter (after). None: there is none to show."""

    prompt: str
    reference: str | None = None
    before: str | None = None
    after: str | None = None
    turns: Sequence[tuple[str, str]] = ()
    """Role and text of each turn of a conversation; where there are any, they stand in the prompt's place."""
    during: Sequence[tuple[int, str]] = ()
    """Steps, and what the adapter said at each."""


def render_examples(samples: Sequence[Sample]) -> str:
    """Return a section with all samples; the first few are open."""
    if not samples:
        return ""
    first, rest = samples[:_SHOWN], samples[_SHOWN:]
    heading = "Before and after" if _answered(samples) else "Records as they are taught"
    inner = tag("h2", heading, id="examples") + _legend(samples)
    inner += "".join(_sample(s, i) for i, s in enumerate(first, 1))
    if rest:
        more = "".join(_sample(s, i) for i, s in enumerate(rest, _SHOWN + 1))
        inner += tag("details", tag("summary", f"{len(rest)} more") + more, cls="more")
    return tag("section", inner, cls="examples", aria_labelledby="examples")


def marked(words: str, other: str, kind: str) -> str:
    """Return `words` as HTML, with the parts that `other` lacks marked; nothing is marked in texts with little in common.

    Spaces are marked only where nothing else differs: there they are the whole difference, elsewhere they would be noise.
    """
    mine, theirs = _WORD.findall(words), _WORD.findall(other)
    if max(len(mine), len(theirs)) > _MOST_WORDS:
        return text(words)
    matcher = SequenceMatcher(None, theirs, mine, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return text(words)
    pieces = [("".join(mine[start:end]), change != "equal") for change, _, _, start, end in matcher.get_opcodes()]
    spaces_too = not any(new and piece.strip() for piece, new in pieces)
    return "".join(
        tag("mark", text(piece), cls=kind) if new and piece and (spaces_too or piece.strip()) else text(piece)
        for piece, new in pieces
    )


def _answered(samples: Sequence[Sample]) -> bool:
    """True if a model answered any of them."""
    return any(sample.before is not None or sample.after is not None for sample in samples)


def _legend(samples: Sequence[Sample]) -> str:
    if not _answered(samples):
        return ""
    referenced = any(s.reference is not None for s in samples)
    words = "Marked: differences from the reference." if referenced else "Marked: parts that only one of the two has."
    return tag("p", words, cls="note")


def _sample(sample: Sample, number: int) -> str:
    columns = _column("Base", sample.before, sample.reference, sample.after, "before")
    columns += _column("With ΔW", sample.after, sample.reference, sample.before, "after")
    if sample.turns:
        turns = "".join(_block(role, _body(words), f"turn {_role(role)}") for role, words in sample.turns)
        parts = [tag("div", tag("h3", f"Conversation {number}") + turns, cls="block prompt turns")]
    else:
        parts = [_block(f"Prompt {number}", _body(sample.prompt), "prompt")]
    if columns:
        parts.append(tag("div", columns, cls="sides"))
    parts += _during(sample.during)
    # A reference that the adapter reproduced is on the page already
    if sample.reference is not None and sample.reference != sample.after:
        parts.append(_block("Reference" if columns else "Taught", _body(sample.reference), "reference"))
    return tag("article", "".join(parts), cls="sample" if sample.reference is not None else "sample unreferenced")


def _role(role: str) -> str:
    """The class of a turn, which no text of a record can name."""
    return role if role in ("system", "user", "assistant", "tool") else "other"


def _during(answers: Sequence[tuple[int, str]]) -> list[str]:
    """The answers during training, folded."""
    if not answers:
        return []
    said = "".join(_block(f"Step {step}", _body(words), "step") for step, words in answers)
    counted = f"{len(answers)} answer{'s' * (len(answers) > 1)} during training"
    return [tag("details", tag("summary", counted) + said, cls="during")]


def _column(label: str, words: str | None, reference: str | None, other: str | None, kind: str) -> str:
    if words is None:
        return ""
    against = reference if reference is not None else other
    inner = marked(words, against, kind) if against is not None else text(words)
    badge = tag("span", "= reference", cls="badge") if words == reference else ""
    return _block(label, _body(words, inner), kind, badge)


def _block(label: str, body: str, kind: str, badge: str = "") -> str:
    return tag("div", tag("h3", text(label) + badge) + body, cls=f"block {kind}")


def _body(words: str, inner: str | None = None) -> str:
    """The text with its whitespace; a long one folds behind its beginning. inner: the same text with marks."""
    if not words.strip():
        return tag("p", "empty" if not words else f"{len(words)} characters of white space", cls="empty")
    full = tag("span", inner if inner is not None else text(words), cls="text", dir="auto")
    if len(words) <= _LONG and words.count("\n") < _LINES:
        return full
    start = "\n".join(words[:_PREVIEW].split("\n")[: _LINES // 2])
    preview = tag("span", text(start) + "…", cls="text preview", dir="auto")
    count = tag("span", f"{len(words):,} characters", cls="count")
    return tag("details", tag("summary", preview + count) + full, cls="long")
