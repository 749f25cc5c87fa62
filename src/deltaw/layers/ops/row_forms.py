"""A pass's batch as its inputs describe it: how many rows, and whether all rows have as many images, patches or sounds.

Knows tensors by their names, and the tokens of a config in whose places images and sounds stand; no layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltaw.errors import AdapterError

_TOKENS = re.compile(r"(image|video|audio|im_patch|image_patch|img|vision|speech)_?(token|patch)?_(id|index)")
_OF_TEXT = re.compile(r".*(input_ids|labels|position_ids|attention_mask|cache_position|token_type_ids|head_mask|bbox)")
"""Integers that may differ from row to row, whatever images they have."""

Named = Mapping[Any, object]
"""A pass's inputs by their names, or by their places where they have none."""


class Form:
    """One pass's batch. Held by the layers that are passed through, and without the batch once the pass is over."""

    def __init__(self, x: Tensor, named: Named, count: int, placeholders: frozenset[int]) -> None:
        self.size = x.shape[0]
        self.tokens = x.shape[0] * x.shape[1] if x.dim() > 1 else x.shape[0]
        self.count = count
        self.named = {n: v for n, v in named.items() if isinstance(v, Tensor) and v.dim()}
        self.key = key_of(self.named, self.size)
        real = [v for v in self.named.values() if v.is_floating_point()]
        # Texts of any length are of one form, and some models cut them into parts
        self.sized = bool(real) and all(len(v) == self.size for v in real)
        self.placeholders = placeholders
        self.why: str | None = None

    def end(self) -> None:
        """Let go of the batch."""
        self.named = {}
        self.why = self.why or ""

    def check(self, layer: str, x: Tensor, rows_at: int, parts: Mapping[object, set[int]]) -> None:
        """Raise AdapterError where it cannot be told which row each part of a layer's input x is of: x has another number of
        parts than the batch has rows, and the rows' images differ, or the model took rows out on the way. `parts`: the numbers
        of parts for a row that batches of a form were found to have."""
        size, known = x.shape[rows_at], parts.get(self.key, set())
        here = f"{layer}: its input is {list(x.shape)} in a batch of {self.size} rows"
        if known and self.sized and size not in {n * self.size for n in known}:
            before = " or ".join(str(n * self.size) for n in sorted(known))
            raise AdapterError(
                f"{here}, where there were {before} parts of such a batch before. "
                "The model takes rows out on the way: which part is whose cannot be told. Use one adapter at a time."
            )
        if size == self.size:
            return
        if self.why is None:
            self.why = uneven(self.named, self.count, self.placeholders)
        if self.why:
            raise AdapterError(
                f"{here}, and the rows have not as many parts each ({self.why}): which part is whose cannot be told. Give "
                "batches whose rows have as many images of one size each, use adapters that leave this layer out, or one at a "
                "time."
            )


def key_of(named: Named, size: int) -> frozenset[object]:
    """Return which tensors a batch has, and of what sizes its images and sounds are; texts of any length are alike."""
    return frozenset(
        (name, v.dim(), tuple(v.shape[1:]) if v.is_floating_point() and len(v) == size else None)
        for name, v in named.items()
        if isinstance(v, Tensor) and v.dim()
    )


def uneven(named: Named, count: int, placeholders: frozenset[int] = frozenset()) -> str:
    """Return in what the rows of a batch differ that says how many parts each has: sizes of images, places for them in the text,
    masks. Empty where they are alike."""
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.dim():
            continue
        if len(value) % count:
            return f"{name} has {len(value)} entries for {count}"
        rows = value.reshape(count, -1)
        if str(name).endswith("input_ids") and not value.is_floating_point():
            places = sum(((rows == token).sum(1) for token in placeholders), rows.new_zeros(count))
            if (places != places[0]).any():
                return f"{name} has places for {places.tolist()} of them"
        elif not value.is_floating_point() and not _OF_TEXT.fullmatch(str(name)) and not (rows == rows[0]).all():
            return f"{name} differs between them"
    return ""


def placeholders_of(config: object, depth: int = 3) -> frozenset[int]:
    """Return the tokens in whose places a model puts images, videos or sounds, by its config and the configs in that."""
    tokens: set[int] = set()
    for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
        if isinstance(value, int) and _TOKENS.fullmatch(name):
            tokens.add(int(value))
        elif depth and name.endswith("config"):
            tokens |= placeholders_of(value, depth - 1)
    return frozenset(tokens)
