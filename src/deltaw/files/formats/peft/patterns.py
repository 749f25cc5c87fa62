"""Regular expressions of settings, matched in bounded time. Knows no settings and no files.

A pattern comes from a file of somebody else, and Python's engine may try it for longer than anyone waits ("(a+)+$"). Only simple
patterns go to that engine. Others are matched by the set of all places where a match of each part may end, which takes at most
about length² · pattern steps. Whether there is a match does not depend on the order in which an engine tries, so the answer is
the same. What needs that order or a text that was matched before (backreferences, atomic groups) is no pattern here.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from functools import lru_cache
from re import _compiler as compiler  # type: ignore[attr-defined]
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

# Characters of a pattern and of a name: far above any module's
_LONGEST = 4000
# A repetition up to so many times counts as a short one
_FEW = 8
# What a pattern for Python's engine may have: a long repetition counts 4, a short one or alternatives 1
_LONG, _SIMPLE = 4, 10
# Places that are looked at for one name before the pattern is given up
_MOST = 1_000_000

_PLAIN = re.compile(r"[\w.-]+")

_Node = Sequence[tuple[Any, Any]]


def problem(pattern: str) -> str | None:
    """Say why a text is no pattern that can be matched; None for one that can be."""
    try:
        _parsed(pattern)
    except ValueError as error:
        return str(error)
    return None


def is_plain(pattern: str) -> bool:
    """Return whether a pattern is a name whose dots stand for any character: adapters may have thousands of these."""
    return _PLAIN.fullmatch(pattern) is not None


def ends_in(pattern: str, name: str) -> bool:
    """Return whether a name is what a plain pattern means, or ends so after a dot."""
    tail = name[-len(pattern) :]
    if len(tail) < len(pattern) or name[: -len(pattern)][-1:] not in ("", "."):
        return False
    return all(p == c or (p == "." and c != "\n") for p, c in zip(pattern, tail, strict=True))


def starts(pattern: str, name: str) -> bool:
    """Return whether the pattern matches at the beginning of the name, as `re.match` does. Raises ValueError."""
    return _matches(pattern, name, whole=False)


def matches(pattern: str, name: str) -> bool:
    """Return whether the pattern matches the whole name, as `re.fullmatch` does. Raises ValueError for what is no pattern."""
    return _matches(pattern, name, whole=True)


def _matches(pattern: str, name: str, *, whole: bool) -> bool:
    if len(name) > _LONGEST:
        raise ValueError(f"a name of {len(name):,} characters is longer than any module's")
    tree, simple, flags = _parsed(pattern)
    if simple:
        rule = _compiled(pattern)
        return (rule.fullmatch(name) if whole else rule.match(name)) is not None
    ends = _Matcher(name, flags).after(tree, {0})
    return len(name) in ends if whole else bool(ends)


@lru_cache(maxsize=1 << 14)
def _compiled(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(pattern)


@lru_cache(maxsize=1 << 14)
def _parsed(pattern: str) -> tuple[_Node, bool, int]:
    """Return a pattern's parts, whether Python's engine matches it in bounded time, and its flags. Raises ValueError."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has {len(pattern):,} characters, more than the {_LONGEST:,} that are read")
    try:
        _compiled(pattern)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError, ValueError, MemoryError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    weight, unknown = _looked_at(list(tree))
    if unknown:
        raise ValueError(f"it has a {unknown}, which is not matched here")
    return list(tree), weight <= _SIMPLE, tree.state.flags


def _looked_at(node: _Node, inside: bool = False) -> tuple[int, str]:
    """Return how much there is in a part to try one after the other, and what is not known in it."""
    weight, unknown = 0, ""
    for code, value in node:
        within, parts = inside, list[_Node]()
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, part = value
            weight += _SIMPLE + 1 if inside else _LONG if most > _FEW else int(most > least)
            parts, within = [part], inside or most > 1
        elif code is codes.SUBPATTERN:
            unknown = unknown or ("flag of a part" if value[1] or value[2] else "")
            parts = [value[3]]
        elif code is codes.BRANCH:
            weight += _SIMPLE + 1 if inside else 1
            parts = value[1]
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            parts = [value[1]]
        elif code not in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.AT):
            unknown = unknown or str(code).lower().replace("_", " ")
        for part in parts:
            more, other = _looked_at(list(part), within)
            weight, unknown = weight + more, unknown or other
    return weight, unknown


class _Matcher:
    """One name, and where in it the parts of a pattern may end."""

    def __init__(self, name: str, flags: int) -> None:
        self.name = name
        self.flags = flags
        self.steps: dict[str, re.Pattern[str]] = {}
        self.looked_at = 0

    def after(self, node: _Node, places: Collection[int]) -> set[int]:
        """Return all places where matches of the parts, one after the other, end that begin at one of these places."""
        now = set(places)
        for code, value in node:
            if not now:
                break
            now = self._after_one(code, value, now)
        return now

    def _after_one(self, code: Any, value: Any, places: set[int]) -> set[int]:
        self.looked_at += len(places)
        if self.looked_at > _MOST:
            raise ValueError("it takes too long to match")
        if code is codes.SUBPATTERN:
            return self.after(value[3], places)
        if code is codes.BRANCH:
            return set().union(*(self.after(part, places) for part in value[1]))
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, part = value
            return self._repeated(least, most, part, places)
        if code in (codes.ASSERT, codes.ASSERT_NOT):
            direction, part = value
            return {p for p in places if self._looks(part, p, direction) == (code is codes.ASSERT)}
        if code is codes.AT:
            return {p for p in places if self._step(code, value).match(self.name, p)}
        step = self._step(code, value)
        return {p + 1 for p in places if p < len(self.name) and step.match(self.name[p])}

    def _repeated(self, least: int, most: int, part: _Node, places: set[int]) -> set[int]:
        """Return the places after `least` to `most` repetitions. More than one round for each place adds none."""
        for _ in range(min(least, len(self.name) + 1)):
            places = self.after(part, places)
        ends, new = set(places), set(places)
        for _ in range(min(most - least, len(self.name) + 1)):
            new = self.after(part, new) - ends
            if not new:
                break
            ends |= new
        return ends

    def _looks(self, part: _Node, place: int, direction: int) -> bool:
        if direction > 0:
            return bool(self.after(part, {place}))
        width = parser.SubPattern(parser.State(), list(part)).getwidth()[0]
        return place >= width and place in self.after(part, {place - width})

    def _step(self, code: Any, value: Any) -> re.Pattern[str]:
        """Return the expression of one part of the pattern that is a character, or a place between two."""
        key = repr((code, value))
        if key not in self.steps:
            state = parser.State()
            state.flags, state.str = self.flags, ""
            self.steps[key] = compiler.compile(parser.SubPattern(state, [(code, value)]), self.flags)
        return self.steps[key]
