"""transformers' eos_token_id, which is one token, several, or None; and an adapter's end tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Ends = tuple[int, ...]

TAUGHT = "ends"
"""Key in an attached adapter's metadata: the tokens that end what it was taught to say."""


def listed(eos: Any) -> Ends:
    """Its tokens."""
    if eos is None:
        return ()
    return tuple(int(end) for end in eos) if isinstance(eos, (list, tuple)) else (int(eos),)


def extended(eos: Any, ends: Iterable[int]) -> Any:
    """An eos_token_id with these among it: the same value where they are already, else all of them as a list."""
    before = listed(eos)
    added = [end for end in dict.fromkeys(ends) if end not in before]
    return [*before, *added] if added else eos


def common(ends: Iterable[Ends]) -> Ends:
    """The tokens that are among each of these, in the order of the first."""
    first, *others = ends
    return tuple(end for end in first if all(end in own for own in others))
