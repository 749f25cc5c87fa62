"""transformers' eos_token_id, which is one token, several, or None."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Ends = tuple[int, ...]


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
